"""A batch that a sampler drew, and what a logger wants to know of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_ext.store.records import StoredTrajectory


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
