"""The statements behind TrajectoryStore: inserting what is missing, reading by id, streaming."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from spo_ext.store import schema
from spo_ext.store.database import Database
from spo_ext.store.rows import Row, chunks

_PAGE = 256  # rows in memory at once while streaming


def insert_missing(
    connection: sa.Connection, table: sa.Table, rows: list[Row]
) -> tuple[list[int], Counter[int]]:
    """The id of each row, and how often a row was there before, by id.

    Looking first and inserting then is safe: the caller holds the write lock.
    """
    hashes = [row["hash"] for row in rows]
    ids = _ids_of(connection, table, hashes)
    missing: dict[bytes, Row] = {}
    for row in rows:
        if row["hash"] not in ids:
            missing.setdefault(row["hash"], row)
    if missing:
        connection.execute(sa.insert(table), list(missing.values()))
        ids.update(_ids_of(connection, table, list(missing)))
    again = Counter(ids[key] for key in hashes)
    again.subtract(ids[key] for key in missing)
    return [ids[key] for key in hashes], +again


def _ids_of(connection: sa.Connection, table: sa.Table, hashes: list[bytes]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for part in chunks(hashes):
        query = sa.select(table.c.hash, table.c.id).where(table.c.hash.in_(part))
        found.update({row.hash: row.id for row in connection.execute(query)})
    return found


def check_splits(connection: sa.Connection, rows: list[Row]) -> None:
    """Raises ValueError if the content of a new prompt is, or would be, in another split too."""
    table = schema.prompts.c
    splits: dict[bytes, str] = {}
    for part in chunks([row["content_hash"] for row in rows]):
        query = sa.select(table.content_hash, table.split).where(table.content_hash.in_(part))
        splits.update({row.content_hash: row.split for row in connection.execute(query)})
    for index, row in enumerate(rows):
        split = splits.setdefault(row["content_hash"], row["split"])
        if split != row["split"]:
            raise ValueError(
                f"add_prompts: prompts[{index}].split must be {split!r}, the split that has this "
                f"prompt already, got {row['split']!r}"
            )


def count_duplicates(
    connection: sa.Connection, ids: list[int], rows: list[Row], again: Counter[int]
) -> int:
    """Adds to the counters of stored trajectories; returns how many came with another reward."""
    table = schema.trajectories
    if not again:
        return 0
    stored = {row.id: row.reward for row in by_id(connection, "append", table, list(again))}
    conflicts = Counter(
        key
        for key, row in zip(ids, rows, strict=True)
        if key in stored and row["reward"] != stored[key]
    )
    counts = ("duplicates", again), ("conflicts", conflicts)
    changes = {name: table.c[name] + sa.bindparam(f"more_{name}") for name, _ in counts}
    connection.execute(
        sa.update(table).where(table.c.id == sa.bindparam("row")).values(changes),
        [{"row": key, **{f"more_{name}": count[key] for name, count in counts}} for key in again],
    )
    return conflicts.total()


def append(
    connection: sa.Connection, rows: list[Row], writer: str, batch: str
) -> tuple[list[int], int, int, int]:
    """Ids of trajectories in the order of rows; how many are new, duplicates and conflicts.

    A batch that the writer's last append has stored already is not counted again.
    """
    table = schema.appends
    last = sa.select(table).where(table.c.writer == writer)
    known = connection.execute(last).first()
    if known is not None and known.batch == batch:
        found = _ids_of(connection, schema.trajectories, [row["hash"] for row in rows])
        ids = [found[row["hash"]] for row in rows]
        return ids, known.new, known.duplicates, known.conflicts
    ids, again = insert_missing(connection, schema.trajectories, rows)
    conflicts = count_duplicates(connection, ids, rows, again)
    repeats = again.total()
    new = len(ids) - repeats
    values = {"batch": batch, "new": new, "duplicates": repeats, "conflicts": conflicts}
    if known is None:
        connection.execute(sa.insert(table).values(writer=writer, **values))
    else:
        connection.execute(sa.update(table).where(table.c.writer == writer).values(**values))
    return ids, new, repeats, conflicts


def put_refusals(
    connection: sa.Connection, run: str, refused: Mapping[int, tuple[int, str]]
) -> None:
    table = schema.refusals
    for prompt_id, (tokens, reason) in refused.items():
        same = (table.c.run == run, table.c.prompt_id == prompt_id)
        connection.execute(sa.delete(table).where(*same))
        row = {"run": run, "prompt_id": prompt_id, "tokens": tokens, "reason": reason}
        connection.execute(sa.insert(table).values(**row))


def refusals(connection: sa.Connection, run: str) -> dict[int, tuple[int, str]]:
    table = schema.refusals
    rows = connection.execute(sa.select(table).where(table.c.run == run))
    return {row.prompt_id: (row.tokens, row.reason) for row in rows}


def by_id(
    connection: sa.Connection, function: str, table: sa.Table, ids: Sequence[int]
) -> list[sa.Row[Any]]:
    """In the order of ids. Raises ValueError for an id that is not stored."""
    found = {}
    for part in chunks(list(ids)):
        query = sa.select(table).where(table.c.id.in_(part))
        found.update({row.id: row for row in connection.execute(query)})
    for index, key in enumerate(ids):
        if key not in found:
            raise ValueError(f"{function}: ids[{index}] must be in {table.name}, got {key!r}")
    return [found[key] for key in ids]


def stream(
    database: Database, table: sa.FromClause, where: list[sa.ColumnElement[bool]]
) -> Iterator[sa.Row[Any]]:
    """Rows by id up to the newest one now, in a transaction per page.

    One long transaction would keep SQLite from folding its log into the file, and PostgreSQL from
    cleaning up.
    """
    last_id = sa.select(sa.func.max(table.c.id))
    newest = database.reading(lambda connection: connection.execute(last_id).scalar()) or 0
    last = 0
    while True:
        query = sa.select(table).where(table.c.id > last, table.c.id <= newest, *where)
        query = query.order_by(table.c.id).limit(_PAGE)
        page = database.reading(partial(_all, query=query))
        yield from page
        if len(page) < _PAGE:
            return
        last = page[-1].id


def _all(connection: sa.Connection, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
    return connection.execute(query).all()


def samplers(connection: sa.Connection) -> list[str]:
    return list(connection.execute(sa.select(schema.samplers.c.name)).scalars())


def forget_sampler(connection: sa.Connection, name: str) -> None:
    for column in (schema.draws.c.sampler, schema.batches.c.sampler, schema.samplers.c.name):
        connection.execute(sa.delete(column.table).where(column == name))


def counters(connection: sa.Connection) -> dict[str, int]:
    trajectories = schema.trajectories
    counted = {
        "prompts": sa.select(sa.func.count()).select_from(schema.prompts),
        "trajectories": sa.select(sa.func.count()).select_from(trajectories),
        "duplicates": sa.select(sa.func.coalesce(sa.func.sum(trajectories.c.duplicates), 0)),
        "conflicts": sa.select(sa.func.coalesce(sa.func.sum(trajectories.c.conflicts), 0)),
        "draws": sa.select(sa.func.count()).select_from(schema.draws),
        "ref_logprobs": sa.select(sa.func.count()).select_from(schema.ref_logprobs),
    }
    return {name: int(connection.execute(query).scalar_one()) for name, query in counted.items()}
