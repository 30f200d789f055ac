"""Rows of other pools that join online rows of the same prompt in a mixed group."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa
import torch
from torch import Tensor

from spo_ext.store import schema
from spo_ext.store.index import Columns
from spo_ext.store.mixture import SamplerConfig, pool_condition
from spo_ext.store.store import TrajectoryStore


class Companions:
    """What the next batch may take from the pools beside "online".

    Args:
        pool: [M], of each row of columns. allowed: bool [M].
        order: a random number for each row [n] of columns, by its number of uses.

    Attributes:
        prompts: keys of the prompts that have enough in every pool, in ascending order.
    """

    def __init__(
        self,
        config: SamplerConfig,
        columns: Columns,
        pool: Tensor,
        allowed: Tensor,
        order: Callable[[Tensor], Tensor],
    ) -> None:
        self._columns = columns
        self._parts: list[tuple[Tensor, int]] = []
        enough: list[Tensor] = []
        for number, (name, size) in enumerate(config.rows_per_group.items()):
            if name == "online":
                continue
            rows = (allowed & (pool == number)).nonzero()[:, 0]
            # By prompt, within one by uses, within those at random.
            rows = rows[order(rows).argsort()]
            rows = rows[columns.uses[rows].argsort(stable=True)]
            rows = rows[columns.prompt_key[rows].argsort(stable=True)]
            self._parts.append((rows, size))
            keys, counts = torch.unique_consecutive(columns.prompt_key[rows], return_counts=True)
            enough.append(keys[counts >= size])
        self.prompts = enough[0]
        for keys in enough[1:]:
            self.prompts = self.prompts[torch.isin(self.prompts, keys)]

    def of(self, prompt_key: Tensor) -> Tensor:
        """The rows that join a group of this prompt, one of `prompts`."""
        found = []
        for rows, size in self._parts:
            first = int(torch.searchsorted(self._columns.prompt_key[rows], prompt_key))
            found.append(rows[first : first + size])
        return torch.cat(found)


def prompts_with_companions(store: TrajectoryStore, config: SamplerConfig) -> set[int]:
    """Ids of the prompts that have enough trajectories for a mixed group in every pool but
    "online"."""
    found: list[set[int]] = []
    prompt = schema.trajectories.c.prompt_id
    with store.database.read() as connection:
        for pool, size in config.rows_per_group.items():
            if pool == "online":
                continue
            query = sa.select(prompt).where(pool_condition(pool, config.run)).group_by(prompt)
            rows = connection.execute(query.having(sa.func.count() >= size))
            found.append(set(rows.scalars()))
    return set.intersection(*found)
