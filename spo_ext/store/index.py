"""The sampler's view of the store: some 60 bytes for each trajectory, never its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import torch
from torch import Tensor

from spo_ext.store import schema
from spo_ext.store.codec import shuffle_key
from spo_ext.store.mixture import SamplerConfig, pool_condition

_PAGE = 20_000
_NO_VERSION = -1
_NEVER = -1
_LONG: Any = {"dtype": torch.int64, "device": "cpu"}  # whatever the default device is


@dataclass(slots=True)
class Columns:
    """One entry per trajectory of any pool, by id; all [M].

    key and prompt_key are of the content, so that an order by them does not depend on ids. A cell
    is a pool and, in it, a stratum or the rest. epoch is that of the latest draw, uses the number
    of draws.
    """

    id: Tensor
    key: Tensor
    prompt_key: Tensor
    version: Tensor
    cell: Tensor
    uses: Tensor
    epoch: Tensor


class Index:
    """Follows the store, and the draws of one sampler. epochs [cells] is the present epoch."""

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        self._pools = list(config.fractions)
        self.strata = len(config.strata) + 1  # the last one is the rest
        self.columns = Columns(*(torch.empty(0, **_LONG) for _ in range(7)))
        self.epochs = torch.zeros(len(self._pools) * self.strata, **_LONG)
        self._last = 0

    def refresh(self, connection: sa.Connection) -> None:
        """Takes in what was appended since."""
        trajectories, prompts = schema.trajectories.c, schema.prompts.c
        conditions = [pool_condition(pool, self._config.run) for pool in self._pools]
        pool = sa.case(*((condition, i) for i, condition in enumerate(conditions)))
        query = (
            sa.select(
                trajectories.id,
                trajectories.hash,
                prompts.hash.label("prompt_hash"),
                trajectories.policy_version,
                trajectories.reward,
                pool.label("pool"),
            )
            .join(schema.prompts, trajectories.prompt_id == prompts.id)
            .where(prompts.split == self._config.split, sa.or_(*conditions))
            .order_by(trajectories.id)
            .limit(_PAGE)
        )
        while page := connection.execute(query.where(trajectories.id > self._last)).all():
            rows = [
                (
                    row.id,
                    shuffle_key(row.hash),
                    shuffle_key(row.prompt_hash),
                    _NO_VERSION if row.policy_version is None else row.policy_version,
                    row.pool * self.strata + self._stratum(row.reward),
                    0,
                    _NEVER,
                )
                for row in page
            ]
            new = torch.tensor(rows, **_LONG).unbind(1)
            names = Columns.__slots__
            old = [getattr(self.columns, name) for name in names]
            self.columns = Columns(*map(torch.cat, zip(old, new, strict=True)))
            self._last = page[-1].id

    def apply(self, ids: Tensor, epochs: Tensor) -> None:
        """Counts draws [n], in whatever order. Raises ValueError if one is in no pool."""
        columns = self.columns
        rows = self.rows_of(ids)
        columns.uses.index_add_(0, rows, torch.ones_like(rows))
        columns.epoch.scatter_reduce_(0, rows, epochs, "amax")
        self.epochs.scatter_reduce_(0, columns.cell[rows], epochs, "amax")

    def rows_of(self, ids: Tensor) -> Tensor:
        rows = torch.searchsorted(self.columns.id, ids).clamp(max=max(len(self.columns.id) - 1, 0))
        if len(ids) and (len(self.columns.id) == 0 or bool((self.columns.id[rows] != ids).any())):
            raise ValueError(
                "Sampler: a recorded draw must be in a pool of the mixture, got others"
            )
        return rows

    def forget_draws(self) -> None:
        self.columns.uses.zero_()
        self.columns.epoch.fill_(_NEVER)
        self.epochs.zero_()

    def _stratum(self, reward: float) -> int:
        for index, stratum in enumerate(self._config.strata):
            if stratum.low <= reward < stratum.high:
                return index
        return self.strata - 1
