"""Records as rows of the tables, and back."""

from __future__ import annotations

import json
import time
from typing import Any

import sqlalchemy as sa

from spo_ext.store import schema
from spo_ext.store.codec import (
    content_hash,
    decode_contexts,
    decode_floats,
    decode_mask,
    decode_tokens,
    encode_contexts,
    encode_floats,
    encode_json,
    encode_mask,
    encode_tokens,
)
from spo_ext.store.records import Origin, Prompt, StoredPrompt, StoredTrajectory, Trajectory

Row = dict[str, Any]


def prompt_row(prompt: Prompt) -> Row:
    content = encode_json(prompt.content)
    token_ids = None if prompt.token_ids is None else encode_tokens(prompt.token_ids)
    tests, answer = encode_json(prompt.tests), encode_json(prompt.answer)
    columns = None if prompt.columns is None else encode_json(prompt.columns)
    # Without columns it has the hash that all had before there were any.
    more = () if columns is None else (columns,)
    return {
        "hash": content_hash(content, token_ids, tests, answer, *more),
        "content_hash": content_hash(content),
        "content": content,
        "token_ids": token_ids,
        "tests": tests,
        "answer": answer,
        "columns": columns,
        "split": prompt.split,
        "created_at": time.time(),
    }


def stored_prompt(row: sa.Row[Any]) -> StoredPrompt:
    return StoredPrompt(
        content=json.loads(row.content),
        token_ids=None if row.token_ids is None else decode_tokens(row.token_ids),
        tests=json.loads(row.tests),
        answer=json.loads(row.answer),
        columns=None if row.columns is None else json.loads(row.columns),
        split=row.split,
        id=row.id,
        created_at=row.created_at,
    )


def trajectory_row(trajectory: Trajectory, prompt_hash: bytes) -> Row:
    """Rewards and log-probabilities are no part of the hash: they are measured, not written."""
    origin = trajectory.origin
    token_ids = encode_tokens(trajectory.token_ids)
    who = (origin.kind, origin.run, origin.policy_version, origin.model)
    how = (trajectory.temperature, trajectory.top_p, trajectory.finish)
    # A first draw has the hash that all had before draws were told apart.
    again = (trajectory.draw,) if trajectory.draw else ()
    behaviour, paid = trajectory.behaviour_logprobs, trajectory.token_rewards
    mask, contexts = trajectory.completion_mask, trajectory.contexts
    turns = (
        None if mask is None else encode_mask(mask),
        None if contexts is None else encode_contexts(contexts),
    )
    # One completion of one prompt has the hash that all had before there were turns.
    more = () if turns == (None, None) else turns
    return {
        "hash": content_hash(prompt_hash, token_ids, encode_json([*who, *how, *again]), *more),
        "prompt_id": trajectory.prompt_id,
        "token_ids": token_ids,
        "num_tokens": trajectory.num_policy_tokens,
        "reward": trajectory.reward,
        "reason": encode_json(trajectory.reason),
        "kind": origin.kind,
        "run": origin.run,
        "policy_version": origin.policy_version,
        "model": origin.model,
        "finish": trajectory.finish,
        "behaviour_logprobs": None if behaviour is None else encode_floats(behaviour),
        "temperature": trajectory.temperature,
        "top_p": trajectory.top_p,
        "draw": trajectory.draw,
        "completion_mask": turns[0],
        "contexts": turns[1],
        "token_rewards": None if paid is None else encode_floats(paid),
        "info": None if trajectory.info is None else encode_json(trajectory.info),
        "created_at": time.time(),
    }


def stored_trajectory(row: sa.Row[Any]) -> StoredTrajectory:
    behaviour, mask, paid = row.behaviour_logprobs, row.completion_mask, row.token_rewards
    token_ids = decode_tokens(row.token_ids)
    return StoredTrajectory(
        prompt_id=row.prompt_id,
        token_ids=token_ids,
        reward=row.reward,
        origin=Origin(row.kind, row.run, row.policy_version, row.model),
        finish=row.finish,
        reason=json.loads(row.reason),
        behaviour_logprobs=None if behaviour is None else decode_floats(behaviour),
        temperature=row.temperature,
        top_p=row.top_p,
        draw=row.draw,
        completion_mask=None if mask is None else decode_mask(mask, len(token_ids)),
        contexts=None if row.contexts is None else decode_contexts(row.contexts),
        token_rewards=None if paid is None else decode_floats(paid),
        info=None if row.info is None else json.loads(row.info),
        id=row.id,
        created_at=row.created_at,
        duplicates=row.duplicates,
        conflicts=row.conflicts,
    )


def prompt_hashes(connection: sa.Connection, ids: set[int]) -> dict[int, bytes]:
    table = schema.prompts.c
    found: dict[int, bytes] = {}
    for part in chunks(sorted(ids)):
        rows = connection.execute(sa.select(table.id, table.hash).where(table.id.in_(part)))
        found.update({row.id: row.hash for row in rows})
    return found


def chunks(items: list[Any], size: int = 500) -> list[list[Any]]:
    """Short enough for one statement: SQLite allows 32766 values."""
    return [items[start : start + size] for start in range(0, len(items), size)]
