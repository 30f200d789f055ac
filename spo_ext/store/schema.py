"""Tables of the store, and the steps that bring those of older versions up to date.

A change of a table is a new version and a new step.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

# SQLite counts rows up only in a column of its type INTEGER; PostgreSQL's would end at 2^31.
_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.Text  # as encode_json writes it

metadata = sa.MetaData()

prompts = sa.Table(
    "prompts",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("hash", sa.LargeBinary, nullable=False, unique=True),
    # Of the content alone: the same text may not be in two splits, whatever its tests.
    sa.Column("content_hash", sa.LargeBinary, nullable=False, index=True),
    sa.Column("content", _JSON, nullable=False),
    sa.Column("token_ids", sa.LargeBinary),
    sa.Column("tests", _JSON, nullable=False),
    sa.Column("answer", _JSON, nullable=False),
    sa.Column("columns", _JSON),
    sa.Column("split", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

prompt_values = sa.Table(
    "prompt_values",
    metadata,
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), primary_key=True),
    sa.Column("reference", sa.Text, primary_key=True),
    sa.Column("beta", sa.Double, primary_key=True),
    sa.Column("temperature", sa.Double, primary_key=True),
    sa.Column("top_p", sa.Double, primary_key=True),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("n", sa.BigInteger, nullable=False),
)

trajectories = sa.Table(
    "trajectories",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("hash", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), nullable=False, index=True),
    sa.Column("token_ids", sa.LargeBinary, nullable=False),
    sa.Column("num_tokens", sa.Integer, nullable=False),  # that the policy wrote
    sa.Column("reward", sa.Double, nullable=False),
    sa.Column("reason", _JSON, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("run", sa.Text),
    sa.Column("policy_version", sa.BigInteger),
    sa.Column("model", sa.Text),
    sa.Column("finish", sa.Text, nullable=False),
    sa.Column("behaviour_logprobs", sa.LargeBinary),
    sa.Column("temperature", sa.Double),
    sa.Column("top_p", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    # Of trajectories of several turns; see records.Trajectory.
    sa.Column("completion_mask", sa.LargeBinary),
    sa.Column("contexts", sa.LargeBinary),
    sa.Column("token_rewards", sa.LargeBinary),
    sa.Column("info", _JSON),
    # How often it was appended again, and how often of those with another reward.
    sa.Column("draw", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("duplicates", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("conflicts", sa.BigInteger, nullable=False, server_default="0"),
)

ref_logprobs = sa.Table(
    "ref_logprobs",
    metadata,
    sa.Column("trajectory_id", sa.ForeignKey("trajectories.id"), primary_key=True),
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("logprobs", sa.LargeBinary, nullable=False),
)

samplers = sa.Table(
    "samplers",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("config", _JSON, nullable=False),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("sampler", sa.ForeignKey("samplers.name"), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("policy_version", sa.BigInteger),
    sa.Column("shortfall", _JSON, nullable=False),
)

draws = sa.Table(
    "draws",
    metadata,
    sa.Column("sampler", sa.Text, primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("trajectory_id", sa.ForeignKey("trajectories.id"), nullable=False, index=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.ForeignKeyConstraint(["sampler", "step"], ["batches.sampler", "batches.step"]),
)

# The last append of each writer: one whose answer was lost is not made again.
appends = sa.Table(
    "appends",
    metadata,
    sa.Column("writer", sa.Text, primary_key=True),
    sa.Column("batch", sa.Text, nullable=False),
    sa.Column("new", sa.BigInteger, nullable=False),
    sa.Column("duplicates", sa.BigInteger, nullable=False),
    sa.Column("conflicts", sa.BigInteger, nullable=False),
)

refusals = sa.Table(
    "refusals",
    metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), primary_key=True),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

schema_version = sa.Table(
    "spo_schema", metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False)
)


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


def _add_turns(connection: sa.Connection) -> None:
    """5 to 6: trajectories of several turns: who wrote which token, and what the policy read."""
    blob = "BYTEA" if connection.dialect.name == "postgresql" else "BLOB"
    for column, kind in (
        ("completion_mask", blob),
        ("contexts", blob),
        ("token_rewards", blob),
        ("info", "TEXT"),
    ):
        connection.exec_driver_sql(f"ALTER TABLE trajectories ADD COLUMN {column} {kind}")


# Step i leads from version i + 1 to i + 2. A step is SQL that both databases understand, and never
# changes; the tables above are only ever the newest version.
STEPS: tuple[Step, ...] = (_add_sampling, _add_draw, _add_appends, _add_columns, _add_turns)
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
        metadata.create_all(connection, checkfirst=False)
        connection.execute(sa.insert(schema_version).values(version=CURRENT))
        return
    if version > CURRENT:
        raise SchemaError(
            f"TrajectoryStore: the database has schema version {version}, this spo_ext knows up to "
            f"{CURRENT}; upgrade spo_ext"
        )
    for step in STEPS[version - 1 :]:
        step(connection)
    if version < CURRENT:
        connection.execute(sa.update(schema_version).values(version=CURRENT))


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
    if schema_version.name in tables:
        return int(connection.execute(sa.select(schema_version.c.version)).scalar_one())
    others = sorted(set(tables) & set(metadata.tables))
    if others:
        raise SchemaError(
            f"TrajectoryStore: the database must be empty or a store, got tables {others} without "
            f"{schema_version.name}"
        )
    return None
