"""Tables of the store. A change here is a new version, and a step in migrations.py."""

from __future__ import annotations

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
    sa.Column("num_tokens", sa.Integer, nullable=False),
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
