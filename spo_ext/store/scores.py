"""What is computed once per reference: log-probabilities of trajectories, values of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from torch import Tensor

from spo_ext.checks import check_name, refuse
from spo_ext.store import schema
from spo_ext.store.codec import decode_floats, encode_floats
from spo_ext.store.records import PromptValue, per_token_tensor
from spo_ext.store.rows import chunks, prompt_hashes


def put_ref_logprobs(
    connection: sa.Connection, fingerprint: str, logprobs: Mapping[int, Tensor]
) -> None:
    check_name("put_ref_logprobs", "fingerprint", fingerprint)
    trajectories, cache = schema.trajectories.c, schema.ref_logprobs.c
    sizes: dict[int, int] = {}
    known: set[int] = set()
    for part in chunks(list(logprobs)):
        found = sa.select(trajectories.id, trajectories.num_tokens)
        rows = connection.execute(found.where(trajectories.id.in_(part)))
        sizes.update({row.id: row.num_tokens for row in rows})
        held = sa.select(cache.trajectory_id).where(cache.fingerprint == fingerprint)
        known.update(connection.execute(held.where(cache.trajectory_id.in_(part))).scalars())
    new = []
    for key, values in logprobs.items():
        if key not in sizes:
            refuse("put_ref_logprobs", "logprobs", "keyed by ids of stored trajectories", key)
        tensor = per_token_tensor("put_ref_logprobs", f"logprobs[{key}]", values, sizes[key])
        if key not in known:
            data = encode_floats(tensor)
            new.append({"trajectory_id": key, "fingerprint": fingerprint, "logprobs": data})
    if new:
        connection.execute(sa.insert(schema.ref_logprobs), new)


def ref_logprobs(
    connection: sa.Connection, ids: Sequence[int], fingerprint: str
) -> list[Tensor | None]:
    cache = schema.ref_logprobs.c
    found: dict[int, Tensor] = {}
    for part in chunks(list(ids)):
        query = sa.select(cache.trajectory_id, cache.logprobs).where(
            cache.fingerprint == fingerprint, cache.trajectory_id.in_(part)
        )
        for row in connection.execute(query):
            found[row.trajectory_id] = decode_floats(row.logprobs)
    return [found.get(key) for key in ids]


def fingerprints(connection: sa.Connection) -> dict[str, int]:
    cache = schema.ref_logprobs.c
    query = sa.select(cache.fingerprint, sa.func.count()).group_by(cache.fingerprint)
    return {
        fingerprint: count
        for fingerprint, count in connection.execute(query.order_by("fingerprint"))
    }


def put_q0(connection: sa.Connection, values: Mapping[int, PromptValue]) -> None:
    table = schema.prompt_values
    stored = prompt_hashes(connection, set(values))
    for key, estimate in values.items():
        if key not in stored:
            refuse("put_q0", "values", "keyed by ids of stored prompts", key)
        if not isinstance(estimate, PromptValue):
            refuse("put_q0", f"values[{key}]", "a PromptValue", estimate)
    for key, estimate in values.items():
        condition = {
            "prompt_id": key,
            "reference": estimate.reference,
            "beta": estimate.beta,
            "temperature": estimate.temperature,
            "top_p": estimate.top_p,
        }
        same = [table.c[name] == value for name, value in condition.items()]
        connection.execute(sa.delete(table).where(*same))
        new = {**condition, "value": estimate.value, "n": estimate.n}
        connection.execute(sa.insert(table).values(**new))


def q0(
    connection: sa.Connection, prompt_ids: Sequence[int], key: tuple[str, float, float, float]
) -> list[PromptValue | None]:
    """key: reference, beta, temperature, top_p."""
    table = schema.prompt_values.c
    columns = (table.reference, table.beta, table.temperature, table.top_p)
    same = [column == value for column, value in zip(columns, key, strict=True)]
    found: dict[int, PromptValue] = {}
    for part in chunks(list(prompt_ids)):
        query = sa.select(schema.prompt_values).where(table.prompt_id.in_(part), *same)
        for row in connection.execute(query):
            found[row.prompt_id] = PromptValue(
                row.value, row.n, row.beta, row.temperature, row.top_p, row.reference
            )
    return [found.get(prompt) for prompt in prompt_ids]
