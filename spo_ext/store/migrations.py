"""Brings the tables of a database to the version that this code reads and writes."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from spo_ext.store import schema

Step = Callable[[sa.Connection], None]


def _add_sampling(connection: sa.Connection) -> None:
    """1 to 2: conflicts of rewards are counted, samplers record what they draw."""
    run = connection.exec_driver_sql
    run("ALTER TABLE trajectories ADD COLUMN conflicts BIGINT DEFAULT '0' NOT NULL")
    run("CREATE TABLE samplers (name TEXT NOT NULL PRIMARY KEY, config TEXT NOT NULL)")
    run(
        "CREATE TABLE batches (sampler TEXT NOT NULL REFERENCES samplers (name), "
        "step BIGINT NOT NULL, policy_version BIGINT, shortfall TEXT NOT NULL, "
        "PRIMARY KEY (sampler, step))"
    )
    run(
        "CREATE TABLE draws (sampler TEXT NOT NULL, step BIGINT NOT NULL, slot INTEGER NOT NULL, "
        "trajectory_id BIGINT NOT NULL REFERENCES trajectories (id), epoch BIGINT NOT NULL, "
        "PRIMARY KEY (sampler, step, slot), "
        "FOREIGN KEY (sampler, step) REFERENCES batches (sampler, step))"
    )
    run("CREATE INDEX ix_draws_trajectory_id ON draws (trajectory_id)")


def _add_draw(connection: sa.Connection) -> None:
    """2 to 3: equal completions that were drawn one after the other are trajectories each."""
    connection.exec_driver_sql(
        "ALTER TABLE trajectories ADD COLUMN draw BIGINT DEFAULT '0' NOT NULL"
    )


def _add_appends(connection: sa.Connection) -> None:
    """3 to 4: appends are told apart, and prompts that no completion can be drawn for are known."""
    run = connection.exec_driver_sql
    run(
        "CREATE TABLE appends (writer TEXT NOT NULL PRIMARY KEY, batch TEXT NOT NULL, "
        "new BIGINT NOT NULL, duplicates BIGINT NOT NULL, conflicts BIGINT NOT NULL)"
    )
    run(
        "CREATE TABLE refusals (run TEXT NOT NULL, "
        "prompt_id BIGINT NOT NULL REFERENCES prompts (id), tokens BIGINT NOT NULL, "
        "reason TEXT NOT NULL, PRIMARY KEY (run, prompt_id))"
    )


def _add_columns(connection: sa.Connection) -> None:
    """4 to 5: prompts keep the other fields of their rows."""
    connection.exec_driver_sql("ALTER TABLE prompts ADD COLUMN columns TEXT")


# Step i leads from version i + 1 to i + 2. A step is SQL that both databases understand, and never
# changes; schema.py is only ever the newest version.
STEPS: tuple[Step, ...] = (_add_sampling, _add_draw, _add_appends, _add_columns)
CURRENT = len(STEPS) + 1


class SchemaError(RuntimeError):
    """The database holds tables that this version of spo_ext cannot use."""


def migrate(connection: sa.Connection) -> None:
    """Creates the tables, or runs the missing steps.

    The caller holds the write lock and commits, so that a step is done whole or not at all, and
    once, whoever else opens the database.

    Raises SchemaError if the database is newer than this code, or is no store.
    """
    version = stored_version(connection)
    if version is None:
        schema.metadata.create_all(connection, checkfirst=False)
        connection.execute(sa.insert(schema.schema_version).values(version=CURRENT))
        return
    if version > CURRENT:
        raise SchemaError(
            f"TrajectoryStore: the database has schema version {version}, this spo_ext knows up to "
            f"{CURRENT}; upgrade spo_ext"
        )
    for step in STEPS[version - 1 :]:
        step(connection)
    if version < CURRENT:
        connection.execute(sa.update(schema.schema_version).values(version=CURRENT))


def require_current(connection: sa.Connection) -> None:
    """Raises SchemaError unless the tables are as this code has them; writes nothing."""
    version = stored_version(connection)
    if version != CURRENT:
        raise SchemaError(
            f"TrajectoryStore: the database can only be read and must have schema version "
            f"{CURRENT}, got {version}; open it once where it can be written"
        )


def stored_version(connection: sa.Connection) -> int | None:
    """None for an empty database."""
    tables = sa.inspect(connection).get_table_names()
    if schema.schema_version.name in tables:
        return int(connection.execute(sa.select(schema.schema_version.c.version)).scalar_one())
    others = sorted(set(tables) & set(schema.metadata.tables))
    if others:
        raise SchemaError(
            f"TrajectoryStore: the database must be empty or a store, got tables {others} without "
            f"{schema.schema_version.name}"
        )
    return None
