"""Rows of other pools that join online rows of the same prompt in a mixed group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spo_ext.store.index import Columns
from spo_ext.store.mixture import SamplerConfig


class Companions:
    """What the next batch may take from the pools beside "online".

    Args:
        pool: [M], of each row of columns. allowed: bool [M].
        order: a random number for each row [n] of columns, by its number of uses.
    """

    def __init__(
        self,
        config: SamplerConfig,
        columns: Columns,
        pool: Tensor,
        allowed: Tensor,
        order: Callable[[Tensor], Tensor],
    ) -> None:
        self._rows: dict[str, tuple[Tensor, Tensor, int]] = {}
        for number, (name, size) in enumerate(config.rows_per_group.items()):
            if name == "online":
                continue
            rows = (allowed & (pool == number)).nonzero()[:, 0]
            # By prompt, within one by uses, within those at random.
            rows = rows[order(rows).argsort()]
            rows = rows[columns.uses[rows].argsort(stable=True)]
            rows = rows[columns.prompt_key[rows].argsort(stable=True)]
            self._rows[name] = rows, columns.prompt_key[rows], size

    def of(self, prompt_key: Tensor) -> Tensor:
        """The rows [n] that join a group of this prompt: of each pool its share, or as many as
        there are."""
        found = []
        for rows, keys, size in self._rows.values():
            first = int(torch.searchsorted(keys, prompt_key))
            last = int(torch.searchsorted(keys, prompt_key, right=True))
            found.append(rows[first : min(first + size, last)])
        return torch.cat(found)

    def empty(self) -> list[str]:
        """Pools without a single row."""
        return [name for name, (rows, _, _) in self._rows.items() if not len(rows)]
