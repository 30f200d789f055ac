"""Draws batches for a learner, and remembers in the store what it drew."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import torch
from torch import Tensor

from spo_ext.checks import check_integer, check_name, refuse
from spo_ext.store import schema
from spo_ext.store.mixture import SamplerConfig
from spo_ext.store.records import StoredTrajectory
from spo_ext.store.selection import Index, Selection, select
from spo_ext.store.store import TrajectoryStore


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """S trajectories and how they came here; tensors are on the CPU.

    S is the batch size of the sampler, or less where mixed groups lack rows of a pool.

    Args:
        uses: int64 [S], how often this sampler has drawn each, this batch included.
        shortfall: what a pool or stratum should have given, and what it gave.
        replayed: drawn before, and read from the store now.
    """

    step: int
    policy_version: int | None
    run: str | None
    trajectories: list[StoredTrajectory]
    uses: Tensor
    shortfall: dict[str, tuple[int, int]]
    replayed: bool

    @property
    def groups(self) -> Tensor:
        """int64 [S], the same number for the same prompt, from 0 on, as `spo_ext.loss` takes it."""
        order: dict[int, int] = {}
        groups = [order.setdefault(row.prompt_id, len(order)) for row in self.trajectories]
        return torch.tensor(groups, device="cpu")

    @property
    def rewards(self) -> Tensor:
        """float32 [S]."""
        rewards = [trajectory.reward for trajectory in self.trajectories]
        return torch.tensor(rewards, dtype=torch.float32, device="cpu")

    @property
    def online(self) -> Tensor:
        """bool [S], written by the policy of the sampler's own run."""
        origins = [trajectory.origin for trajectory in self.trajectories]
        own = [who.kind == "policy" and who.run == self.run for who in origins]
        return torch.tensor(own, device="cpu")

    def metrics(self) -> dict[str, float]:
        """For a logger. age_versions is that of the online rows, absent if there are none."""
        rows, count = self.trajectories, len(self.trajectories)
        online = self.online.tolist()
        values = {
            "store/offline_share": 1 - sum(online) / count,
            "store/reuse": float(self.uses.float().mean()),
            "store/duplicates": sum(row.duplicates for row in rows) / count,
            "store/age_seconds": time.time() - sum(row.created_at for row in rows) / count,
            "store/shortfall": float(sum(want - got for want, got in self.shortfall.values())),
        }
        versions = [row.origin.policy_version for row, own in zip(rows, online, strict=True) if own]
        if self.policy_version is not None and versions:
            ages = [self.policy_version - (version or 0) for version in versions]
            values["store/age_versions"] = sum(ages) / len(ages)
            values["store/age_versions_max"] = float(max(ages))
        return values


class Sampler:
    """Batches of stored trajectories by mixture, recency, reuse and reward.

    Within an epoch of a pool no trajectory is drawn twice; one that is appended joins the present
    epoch. The order follows from the seed and the content of the store, not from the order in
    which producers appended.

    Every batch is recorded under the sampler's name when it is drawn, and asking for the same step
    again gives the same batch. So a run that was killed continues from its checkpoint with the
    batches that it drew after it, then with new ones; and the ranks of one run, each with a
    sampler of the same name and configuration, all get the same batch of each step. They make
    their samplers before the first of them draws.

    Args:
        name: of the run that draws, for its records.
        resume: continue a sampler that has drawn before, from step 0 unless `load_state_dict`
            says where.

    Raises:
        ValueError: if the name has drawn before and `resume` is False, or had another
            configuration. `TrajectoryStore.forget_sampler` frees a name.
    """

    def __init__(
        self, store: TrajectoryStore, name: str, config: SamplerConfig, *, resume: bool = False
    ) -> None:
        check_name("Sampler", "name", name)
        self.store, self.name, self.config = store, name, config
        self._step = 0
        self._index = Index(config)
        stored = store.database.reading(lambda connection: _stored_config(connection, name))
        if stored is not None and not resume:
            refuse("Sampler", "name", "new, or resume True to continue its batches", name)
        self._check_config("Sampler", stored)

    def next_batch(self, policy_version: int | None = None) -> Batch:
        """The batch of the next step.

        Args:
            policy_version: the learner's own, for a mixture with "online" and only for it. Online
                trajectories of later versions are left out.

        Raises:
            SampleShortfall: if the store holds too little for the mixture; the step is not taken,
                so the call may be repeated when more has been appended.
        """
        self._check_version(policy_version)
        database = self.store.database
        database.reading(self._index.refresh)  # what there is now, so that the lock is held briefly

        def draw(connection: sa.Connection) -> tuple[Selection, bool]:
            self._index.refresh(connection)
            stored = _stored_config(connection, self.name)
            self._check_config("Sampler.next_batch", stored)
            recorded = self._recorded(connection)
            if recorded is not None:
                return recorded, True
            chosen = select(self.config, self._index, self._step, policy_version)
            if stored is None:
                row = {"name": self.name, "config": json.dumps(self.config.as_json())}
                connection.execute(sa.insert(schema.samplers).values(**row))
            self._record(connection, chosen, policy_version)
            return chosen, False

        chosen, replayed = database.writing(draw)
        ids = self._index.columns.id[chosen.rows]
        trajectories = self.store.get(ids.tolist())
        # Last, so that after an error in reading them the call may be repeated too.
        self._index.apply(ids, chosen.epochs)
        self._step += 1
        return Batch(
            step=self._step - 1,
            policy_version=policy_version,
            run=self.config.run,
            trajectories=trajectories,
            uses=self._index.columns.uses[chosen.rows],
            shortfall=chosen.shortfall,
            replayed=replayed,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint: where the sampler is. What it drew is in the store."""
        return {"name": self.name, "step": self._step, "config": self.config.as_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where the checkpoint was; the batches after it are drawn again as they were.

        Raises ValueError for the state of another sampler, or if the store does not hold the
        batches before it.
        """
        owner = "Sampler.load_state_dict"
        for key in ("name", "step", "config"):
            if key not in state:
                refuse(owner, "state", f"a mapping with {key}", sorted(state))
        if state["name"] != self.name:
            refuse(owner, "name", repr(self.name), state["name"])
        check_integer(owner, "step", state["step"], 0)
        self._check_config(owner, state["config"])
        step = state["step"]
        table, mine = schema.batches.c, schema.draws.c

        def go(connection: sa.Connection) -> list[tuple[int, int]]:
            before = sa.select(sa.func.count()).where(table.sampler == self.name, table.step < step)
            held = connection.execute(before).scalar_one()
            if held != step:
                refuse(owner, "step", f"at most {held}, the batches in this store", step)
            self._index.refresh(connection)
            query = sa.select(mine.trajectory_id, mine.epoch)
            drawn = connection.execute(query.where(mine.sampler == self.name, mine.step < step))
            return [(row.trajectory_id, row.epoch) for row in drawn]

        ids, epochs = _columns(self.store.database.reading(go))
        self._index.forget_draws()
        self._index.apply(ids, epochs)
        self._step = step

    def _check_version(self, policy_version: int | None) -> None:
        owner, name = "Sampler.next_batch", "policy_version"
        if "online" in self.config.fractions:
            check_integer(owner, name, policy_version, 0)
        elif policy_version is not None:
            refuse(owner, name, "None for a mixture without online", policy_version)

    def _check_config(self, owner: str, stored: Mapping[str, Any] | None) -> None:
        mine = self.config.as_json()
        for key in mine | dict(stored) if stored is not None else ():
            if stored is not None and json.dumps(stored.get(key)) != json.dumps(mine.get(key)):
                expected = f"{stored.get(key)!r} as when {self.name!r} drew before"
                refuse(owner, f"config.{key}", expected, mine.get(key))

    def _recorded(self, connection: sa.Connection) -> Selection | None:
        table, mine = schema.batches.c, schema.draws.c
        here = (table.sampler == self.name, table.step == self._step)
        row = connection.execute(sa.select(table.shortfall).where(*here)).first()
        if row is None:
            return None
        query = sa.select(mine.trajectory_id, mine.epoch).order_by(mine.slot)
        found = connection.execute(
            query.where(mine.sampler == self.name, mine.step == self._step)
        ).all()
        ids, epochs = _columns([(row.trajectory_id, row.epoch) for row in found])
        shortfall = {name: (want, got) for name, (want, got) in json.loads(row.shortfall).items()}
        return Selection(self._index.rows_of(ids), epochs, shortfall)

    def _record(
        self, connection: sa.Connection, chosen: Selection, policy_version: int | None
    ) -> None:
        here = {"sampler": self.name, "step": self._step}
        shortfall = json.dumps(chosen.shortfall)
        batch = {**here, "policy_version": policy_version, "shortfall": shortfall}
        connection.execute(sa.insert(schema.batches).values(**batch))
        ids, epochs = self._index.columns.id[chosen.rows].tolist(), chosen.epochs.tolist()
        drawn = [
            {**here, "slot": slot, "trajectory_id": key, "epoch": epoch}
            for slot, (key, epoch) in enumerate(zip(ids, epochs, strict=True))
        ]
        connection.execute(sa.insert(schema.draws), drawn)


def _stored_config(connection: sa.Connection, name: str) -> dict[str, Any] | None:
    query = sa.select(schema.samplers.c.config).where(schema.samplers.c.name == name)
    text = connection.execute(query).scalar()
    return None if text is None else json.loads(text)


def _columns(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    ids, epochs = torch.tensor(pairs, dtype=torch.int64, device="cpu").view(-1, 2).T.contiguous()
    return ids, epochs
