"""Trajectories across runs, policy versions and machines, in SQLite or PostgreSQL.

    store = TrajectoryStore("trajectories.db")
    prompt = store.add_prompt(Prompt("2 + 2 =", token_ids=[17, 4], answer="4"))
    origin = Origin("policy", run="first", policy_version=3)
    store.append([Trajectory(prompt, [19, 1], reward=1.0, origin=origin, finish="eos")])

Producers append, a learner samples, and neither needs to know of the other.
"""

try:
    import sqlalchemy as _sqlalchemy  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"spo_ext.store needs SQLAlchemy 2 ({error}): pip install 'spo_ext[store]'"
    ) from error

from spo_ext.store.fingerprint import reference_fingerprint
from spo_ext.store.mixture import SamplerConfig, Stratum
from spo_ext.store.records import (
    Appended,
    Origin,
    Prompt,
    PromptValue,
    StoredPrompt,
    StoredTrajectory,
    Trajectory,
)
from spo_ext.store.sampler import Batch, Sampler
from spo_ext.store.schema import SchemaError
from spo_ext.store.selection import SampleShortfall
from spo_ext.store.store import TrajectoryStore

__all__ = [
    "Appended",
    "Batch",
    "Origin",
    "Prompt",
    "PromptValue",
    "SampleShortfall",
    "Sampler",
    "SamplerConfig",
    "SchemaError",
    "StoredPrompt",
    "StoredTrajectory",
    "Stratum",
    "Trajectory",
    "TrajectoryStore",
    "reference_fingerprint",
]
