"""A batch of prompts and their trajectories into the store, in one transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from spo_ext.store import Prompt, Trajectory, TrajectoryStore, queries, rows, schema


@dataclass(frozen=True)
class Ready:
    """Rows of the tables; those of trajectories lack the id of their prompt."""

    prompt: rows.Row
    trajectories: list[rows.Row]
    size: int  # bytes, roughly

    @classmethod
    def of(cls, prompt: Prompt, trajectories: list[Trajectory]) -> Ready:
        row = rows.prompt_row(prompt)
        written = [rows.trajectory_row(item, row["hash"]) for item in trajectories]
        size = len(row["content"]) + len(row["tests"]) + len(row["columns"] or "")
        size += sum(len(t["token_ids"]) for t in written)
        return cls(row, written, size)


@dataclass(frozen=True)
class Loaded:
    """How many were new, how many there already, and how many of those with another reward."""

    prompts: int = 0
    trajectories: int = 0
    known_prompts: int = 0
    known_trajectories: int = 0
    conflicts: int = 0

    def __add__(self, other: Loaded) -> Loaded:
        return Loaded(
            self.prompts + other.prompts,
            self.trajectories + other.trajectories,
            self.known_prompts + other.known_prompts,
            self.known_trajectories + other.known_trajectories,
            self.conflicts + other.conflicts,
        )

    def __str__(self) -> str:
        conflicts = f"; {self.conflicts} keep another reward" if self.conflicts else ""
        return (
            f"stored {self.prompts} prompts and {self.trajectories} trajectories; already there: "
            f"{self.known_prompts} and {self.known_trajectories}{conflicts}"
        )


def other_columns(store: TrajectoryStore, batch: list[Ready]) -> dict[int, list[str]]:
    """By place in the batch: names of columns in which a new prompt differs from an earlier one.

    That has the same content, tests and answer, and stands in the store or in the batch.
    """
    keys = ("content_hash", "tests", "answer")
    table = schema.prompts.c
    first: dict[tuple[Any, ...], str | None] = {}
    known: set[bytes] = set()

    def read(connection: sa.Connection) -> None:
        same = [table[name] for name in keys]
        for part in rows.chunks([ready.prompt for ready in batch]):
            alike = table.content_hash.in_([row["content_hash"] for row in part])
            firsts = sa.select(sa.func.min(table.id)).where(alike).group_by(*same)
            query = sa.select(*same, table["columns"]).where(table.id.in_(firsts))
            first.update({tuple(row[:3]): row[3] for row in connection.execute(query)})
            stored = sa.select(table.hash).where(table.hash.in_([row["hash"] for row in part]))
            known.update(connection.execute(stored).scalars())

    store.database.reading(read)
    found = {}
    for place, row in enumerate(ready.prompt for ready in batch):
        earlier = first.setdefault(tuple(row[name] for name in keys), row["columns"])
        if row["hash"] not in known and (names := _differing(row["columns"], earlier)):
            found[place] = names
        known.add(row["hash"])
    return found


def _differing(one: str | None, other: str | None) -> list[str]:
    """Names of columns that are not the same in both."""
    if one == other:
        return []
    first, second = json.loads(one or "{}"), json.loads(other or "{}")
    return sorted(name for name in first | second if first.get(name) != second.get(name))


def load(store: TrajectoryStore, batch: list[Ready]) -> Loaded:
    """All or nothing. What is there already stays as it is, its count of duplicates too: that says
    how often a policy wrote something again, not how often a file was imported.

    Raises ValueError if another process has meanwhile stored one of the prompts in another split.
    """
    prompts = [ready.prompt for ready in batch]

    def add(connection: sa.Connection) -> Loaded:
        queries.check_splits(connection, prompts)
        ids, again = queries.insert_missing(connection, schema.prompts, prompts)
        new = [
            {**row, "prompt_id": prompt_id}
            for ready, prompt_id in zip(batch, ids, strict=True)
            for row in ready.trajectories
        ]
        keys, known = queries.insert_missing(connection, schema.trajectories, new)
        stored = queries.by_id(connection, "load", schema.trajectories, list(known))
        rewards = {row.id: row.reward for row in stored}
        conflicts = sum(
            key in rewards and row["reward"] != rewards[key]
            for key, row in zip(keys, new, strict=True)
        )
        return Loaded(
            prompts=len(prompts) - again.total(),
            trajectories=len(new) - known.total(),
            known_prompts=again.total(),
            known_trajectories=known.total(),
            conflicts=conflicts,
        )

    return store.database.writing(add)
