"""How much of a rollout is in the store already, and with which rewards."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from spo_ext.rollout.generation import Need
from spo_ext.store import TrajectoryStore, schema
from spo_ext.store.codec import decode_floats, encode_json
from spo_ext.store.records import Origin, Split
from spo_ext.store.rows import chunks


def ids_of_split(store: TrajectoryStore, split: Split, needs: Sequence[Need] = ()) -> list[int]:
    """Ids of its prompts that have one of what a reward needs, in order, without reading them."""
    table = schema.prompts.c
    query = sa.select(table.id).where(table.split == split).order_by(table.id)
    if needs:
        query = query.where(sa.or_(*(table[need] != encode_json(None) for need in needs)))
    return store.database.reading(lambda connection: list(connection.execute(query).scalars()))


def draws(
    store: TrajectoryStore,
    prompt_ids: Sequence[int],
    origin: Origin,
    temperature: float,
    top_p: float,
) -> dict[int, int]:
    """How many completions of each prompt were drawn so; a prompt without any is left out.

    One that was appended twice, as by a producer that was run again, counts twice.
    """
    table = schema.trajectories.c
    drawn = sa.func.sum(1 + table.duplicates)

    def count(connection: sa.Connection) -> dict[int, int]:
        found: dict[int, int] = {}
        for part in chunks(list(prompt_ids)):
            query = sa.select(table.prompt_id, drawn).where(table.prompt_id.in_(part))
            query = query.where(*_same(origin), table.temperature == temperature)
            query = query.where(table.top_p == top_p).group_by(table.prompt_id)
            found.update({row[0]: int(row[1]) for row in connection.execute(query)})
        return found

    return store.database.reading(count)


def rewards_drawn(
    store: TrajectoryStore,
    prompt_ids: Sequence[int],
    *,
    run: str,
    policy_version: int | None,
    temperature: float,
    top_p: float,
) -> list[tuple[int, float, int]]:
    """(prompt id, total reward, times drawn) of the trajectories of a run's policy."""
    table = schema.trajectories.c
    where = [table.kind == "policy", table.run == run]
    where += [table.temperature == temperature, table.top_p == top_p]
    if policy_version is not None:
        where.append(table.policy_version == policy_version)

    def look_up(connection: sa.Connection) -> list[tuple[int, float, int]]:
        found: list[tuple[int, float, int]] = []
        for part in chunks(list(prompt_ids)):
            columns = (table.prompt_id, table.reward, table.token_rewards, 1 + table.duplicates)
            query = sa.select(*columns).where(table.prompt_id.in_(part), *where)
            for prompt, reward, paid, times in connection.execute(query.order_by(table.id)):
                on_the_way = 0.0 if paid is None else float(decode_floats(paid).double().sum())
                found.append((int(prompt), float(reward) + on_the_way, int(times)))
        return found

    return store.database.reading(look_up)


def _same(origin: Origin) -> list[sa.ColumnElement[bool]]:
    table = schema.trajectories.c
    names = ("kind", "run", "policy_version", "model")
    return [table[name].is_not_distinct_from(getattr(origin, name)) for name in names]
