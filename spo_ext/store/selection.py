"""Which trajectories make the next batch. A function of content, seed and earlier draws alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import torch
from torch import Tensor

from spo_ext.store import schema
from spo_ext.store.codec import content_hash, encode_json, shuffle_key
from spo_ext.store.mixture import SamplerConfig, pool_condition

_PAGE = 20_000
_NO_VERSION = -1
_NEVER = -1
_LONG: Any = {"dtype": torch.int64, "device": "cpu"}  # whatever the default device is


@dataclass(slots=True)
class Columns:
    """One entry per trajectory of any pool, by id; all [M].

    key and prompt_key are of the content, so that an order by them does not depend on ids; prompt
    numbers the prompts from 0 on. A cell
    is a pool and, in it, a stratum or the rest. epoch is that of the latest draw, uses the number
    of draws.
    """

    id: Tensor
    key: Tensor
    prompt: Tensor
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
        self.columns = Columns(*(torch.empty(0, **_LONG) for _ in Columns.__slots__))
        self.epochs = torch.zeros(len(self._pools) * self.strata, **_LONG)
        self._last = 0
        self._prompts = torch.empty(2, 0, **_LONG)  # id and key of those of the split

    def refresh(self, connection: sa.Connection) -> None:
        """Takes in what was appended since.

        There may be millions of rows, so pages become tensors column by column, without an object
        for each row. Prompts are read after the trajectories: whatever those refer to is there.
        """
        table, prompts = schema.trajectories.c, schema.prompts.c
        conditions = [pool_condition(pool, self._config.run) for pool in self._pools]
        query = sa.select(
            table.id,
            _first_bytes(table.hash),
            table.prompt_id,
            sa.func.coalesce(table.policy_version, _NO_VERSION),
            table.reward,
            sa.case(*((condition, i) for i, condition in enumerate(conditions))),
        ).where(sa.or_(*conditions))
        new = [
            (*map(_whole, (ids, versions, of)), _keys(hashes), self._cells(pools, rewards))
            for ids, hashes, of, versions, rewards, pools in _pages(connection, query, self._last)
        ]
        if not new:
            return
        of_split = sa.select(prompts.id, _first_bytes(prompts.hash))
        of_split = of_split.where(prompts.split == self._config.split)
        known = [
            torch.stack([_whole(ids), _keys(hashes)])
            for ids, hashes in _pages(connection, of_split, self._last_prompt)
        ]
        self._prompts = torch.cat([self._prompts, *known], 1)
        ids, versions, of, keys, cells = map(torch.cat, zip(*new, strict=True))
        self._last = int(ids[-1])
        places = torch.searchsorted(self._prompts[0], of).clamp(max=len(self._prompts[0]) - 1)
        here = self._prompts[0][places] == of if len(self._prompts[0]) else of < 0
        places = places[here]
        found = [ids[here], keys[here], places, self._prompts[1][places], versions[here]]
        found += [cells[here]]
        found += [torch.zeros_like(found[0]), torch.full_like(found[0], _NEVER)]
        old = [getattr(self.columns, name) for name in Columns.__slots__]
        self.columns = Columns(*map(torch.cat, zip(old, found, strict=True)))

    @property
    def _last_prompt(self) -> int:
        return int(self._prompts[0, -1]) if self._prompts.numel() else 0

    def _cells(self, pools: Sequence[int], rewards: Sequence[float]) -> Tensor:
        """Of each row; a reward is in one stratum at most."""
        given = torch.tensor(rewards, dtype=torch.float64, device="cpu")
        strata = torch.full_like(given, self.strata - 1, dtype=torch.int64)
        for index, stratum in enumerate(self._config.strata):
            strata[(stratum.low <= given) & (given < stratum.high)] = index
        return _whole(pools) * self.strata + strata

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


def _pages(
    connection: sa.Connection, query: sa.Select[Any], last: int
) -> Iterator[Sequence[Sequence[Any]]]:
    """Columns of the rows whose first column, an id, is larger than `last`."""
    key = query.selected_columns[0]
    query = query.order_by(key).limit(_PAGE)
    while True:
        # The driver's own rows, which are made in half of the time of SQLAlchemy's.
        rows = connection.execute(query.where(key > last)).cursor.fetchall()
        if not rows:
            return
        columns = list(zip(*rows, strict=True))
        last = columns[0][-1]
        yield columns


def _first_bytes(digest: sa.ColumnElement[bytes]) -> sa.ColumnElement[bytes]:
    """What `shuffle_key` reads of a hash."""
    return sa.func.substr(digest, 1, 8)


def _keys(digests: Sequence[bytes]) -> Tensor:
    """`shuffle_key` of each, of its first bytes."""
    return torch.tensor(struct.unpack(f"<{len(digests)}q", b"".join(digests)), **_LONG)


def _whole(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, **_LONG)


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


_GOLDEN = (math.sqrt(5) - 1) / 2


class SampleShortfall(RuntimeError):
    """The store has too few trajectories for the mixture that was asked for.

    pools: those of the mixture that lack some.
    """

    def __init__(self, message: str, pools: Sequence[str]) -> None:
        super().__init__(message)
        self.pools = tuple(pools)


@dataclass(slots=True)
class Selection:
    """rows [n] of the index and the epoch of each; shortfall: pool or stratum -> wanted, got."""

    rows: Tensor
    epochs: Tensor
    shortfall: dict[str, tuple[int, int]] = field(default_factory=dict)


def select(config: SamplerConfig, index: Index, step: int, policy_version: int | None) -> Selection:
    """Raises SampleShortfall if a pool, or with on_shortfall "fill" the store, has too little."""
    return _Draw(config, index, step, policy_version).batch()


class _Draw:
    def __init__(
        self, config: SamplerConfig, index: Index, step: int, policy_version: int | None
    ) -> None:
        self.config, self.step, self.policy_version = config, step, policy_version
        self.columns = index.columns
        self.strata = index.strata
        self.epochs = index.epochs.clone()  # what is not drawn in the end has not happened
        self.pool = self.columns.cell // self.strata
        self.open = self._eligible()
        self.picked: list[Tensor] = []  # units: one trajectory, or a group of one prompt
        self.picked_epochs: list[Tensor] = []
        self.shortfall: dict[str, tuple[int, int]] = {}
        self.names = list(config.fractions)
        self.size = config.group_size  # rows of a pool that are drawn together
        self.companions: Companions | None = None
        if config.mixed_groups:
            self.size = config.rows_per_group["online"]
            self.companions = Companions(
                config, self.columns, self.pool, self.open, self._order_companions
            )

    def batch(self) -> Selection:
        if self.companions is None:
            self._draw_pools()
        else:
            self._draw_mixed(self.companions)
        first = self.columns.key[torch.stack([unit[0] for unit in self.picked])]
        order = _mix(first ^ self._salt("order", self.step)).argsort()
        rows = torch.cat([self.picked[i] for i in order.tolist()])
        epochs = torch.cat([self.picked_epochs[i] for i in order.tolist()])
        return Selection(rows, epochs, self.shortfall)

    def _draw_pools(self) -> None:
        size, names = self.size, self.names
        wanted = _counts(self.config, self.step)
        for pool, count in enumerate(wanted):
            got = self._draw_pool(pool, count)
            if got < count:
                self.shortfall[names[pool]] = (count * size, got * size)
        missing = sum(wanted) - len(self.picked)
        if missing and self.config.on_shortfall == "raise":
            raise self._too_little()
        for pool in range(len(names)):
            missing -= self._draw_pool(pool, missing)
        if missing:
            raise self._too_little()

    def _draw_mixed(self, companions: Companions) -> None:
        """Online groups; `_pick_groups` adds the rows that join them."""
        count = self.config.batch_size // self.config.group_size
        self._take(self.pool == self.names.index("online"), count)
        pools = self.pool[torch.cat([*self.picked, self.pool.new_empty(0)])]
        for pool, (name, rows) in enumerate(self.config.rows_per_group.items()):
            wanted, got = count * rows, int((pools == pool).sum())
            if got < wanted:
                self.shortfall[name] = (wanted, got)
        lacking = ["online"] if "online" in self.shortfall else companions.empty()
        if lacking:
            raise self._too_little(lacking)

    def _eligible(self) -> Tensor:
        columns, config = self.columns, self.config
        allowed = torch.ones_like(columns.id, dtype=torch.bool)
        if config.max_uses is not None:
            allowed &= columns.uses < config.max_uses
        pools = list(config.fractions)
        if "online" in pools:
            assert self.policy_version is not None
            online = self.pool == pools.index("online")
            # Before a crash the run may have come further than the checkpoint that it resumes.
            late = columns.version > self.policy_version
            if config.oldest is not None:
                late |= columns.version < self.policy_version - config.oldest
            allowed &= ~(online & late)
        return allowed

    def _draw_pool(self, pool: int, count: int) -> int:
        """Picks up to `count` units of the pool; how many it found."""
        if count < 1:
            return 0
        before = len(self.picked)
        inside = self.pool == pool
        for stratum, rule in enumerate(self.config.strata):
            quota = min(math.ceil(rule.fraction * count - 1e-9), count + before - len(self.picked))
            got = self._take(inside & (self.columns.cell % self.strata == stratum), quota)
            if got < quota:
                name = f"{list(self.config.fractions)[pool]} reward [{rule.low}, {rule.high})"
                self.shortfall[name] = (quota, got)
        self._take(inside, count - (len(self.picked) - before))
        return len(self.picked) - before

    def _take(self, inside: Tensor, count: int) -> int:
        """Picks from `inside` what this epoch has not drawn yet, then starts another epoch."""
        pick = self._pick_groups if self.config.group_size > 1 else self._pick
        fresh = self.columns.epoch < self.epochs[self.columns.cell]
        if self.config.replay_versions is not None:
            fresh |= self.pool == self.names.index("online")
        fresh &= inside & self.open
        got = pick(fresh, count)
        if got < count and bool((inside & self.open).any()):
            cells = self.columns.cell[inside]
            self.epochs += torch.bincount(cells, minlength=len(self.epochs)) > 0
            got += pick(inside & self.open, count - got)
        return got

    def _pick(self, candidates: Tensor, count: int) -> int:
        rows = candidates.nonzero()[:, 0]
        order = self._order("row", self.columns.key[rows], rows)
        chosen = rows[order.topk(min(count, len(rows)), largest=False).indices]
        for slot in range(len(chosen)):
            self._keep(chosen[slot : slot + 1])
        return len(chosen)

    def _pick_groups(self, candidates: Tensor, count: int) -> int:
        """Of the prompts with enough rows the first in random order, then rows of those alone."""
        rows = candidates.nonzero()[:, 0]
        if not len(rows):
            return 0
        columns, size = self.columns, self.size
        of = columns.prompt[rows]
        one = torch.zeros(int(columns.prompt.max()) + 1, **_LONG)
        one[of] = rows  # of each prompt, whichever
        enough = (torch.bincount(of, minlength=len(one)) >= size).nonzero()[:, 0]
        order = self._order("prompt", columns.prompt_key[one[enough]], one[enough])
        chosen = enough[order.topk(min(count, len(enough)), largest=False).indices]
        wanted = torch.zeros(len(one), dtype=torch.bool, device="cpu")
        wanted[chosen] = True
        rows = rows[wanted[of]]
        rows = rows[self._order("row", columns.key[rows], rows).argsort()]
        rows = rows[columns.prompt[rows].argsort(stable=True)]
        # Rows of a prompt now lie together, in random order.
        for start in torch.searchsorted(columns.prompt[rows], chosen).tolist():
            group = rows[start : start + size]
            if self.companions is not None:
                group = torch.cat([group, self.companions.of(columns.prompt_key[group[0]])])
            self._keep(group)
        # A second group of a prompt in this batch would only make the first one larger.
        self.open &= ~wanted[columns.prompt]
        return len(chosen)

    def _keep(self, unit: Tensor) -> None:
        self.picked.append(unit)
        self.picked_epochs.append(self.epochs[self.columns.cell[unit]])
        self.open[unit] = False

    def _order(self, what: str, keys: Tensor, rows: Tensor) -> Tensor:
        """A random number for each key, another one in every epoch; of a replay, in every step."""
        replay = self.config.replay_versions is not None
        salts = [self._salt(what, self.step if replay else int(epoch)) for epoch in self.epochs]
        by_cell = torch.tensor(salts, device="cpu")
        return _mix(keys ^ by_cell[self.columns.cell[rows]])

    def _order_companions(self, rows: Tensor) -> Tensor:
        uses = self.columns.uses[rows]
        most = int(uses.max()) if len(rows) else 0
        salts = [self._salt("companion", number) for number in range(most + 1)]
        return _mix(self.columns.key[rows] ^ torch.tensor(salts, device="cpu")[uses])

    def _salt(self, what: str, number: int) -> int:
        return shuffle_key(content_hash(encode_json([self.config.seed, what, number])))

    def _too_little(self, lacking: Sequence[str] | None = None) -> SampleShortfall:
        stored = {name: int((self.pool == pool).sum()) for pool, name in enumerate(self.names)}
        config = self.config
        mixed = f" mixed, {self.config.rows_per_group} of a prompt" if config.mixed_groups else ""
        message = (
            f"Sampler: the store must hold enough for a batch of {config.batch_size} at step "
            f"{self.step}, got too little (wanted, got): {self.shortfall}. Stored: {stored}; "
            f"policy_version {self.policy_version}, max_offpolicy_steps "
            f"{config.oldest}, max_uses {config.max_uses}, "
            f"group_size {config.group_size}{mixed}, split {config.split}"
        )
        short = [name for name in self.names if name in self.shortfall]
        return SampleShortfall(message, short if lacking is None else lacking)


def _counts(config: SamplerConfig, step: int) -> list[int]:
    """Units of each pool at this step, their sum exact.

    A fraction that makes no whole number is rounded up or down such that it is met in the long
    run: one of 0.01 still gives one row in a hundred. The offset moves evenly through [0, 1).
    """
    units = config.batch_size // config.group_size
    start = shuffle_key(content_hash(encode_json([config.seed, "counts"]))) / 2**64
    offset = (start + _GOLDEN * step) % 1.0
    bounds, total = [0], 0.0
    for fraction in config.fractions.values():
        total += fraction
        bounds.append(math.floor(total * units + offset + 1e-9))
    bounds[-1] = units
    return [max(high - low, 0) for low, high in zip(bounds, bounds[1:], strict=False)]


def _mix(keys: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64 bits that looks random."""

    def shifted(values: Tensor, bits: int) -> Tensor:
        return values ^ ((values >> bits) & ((1 << (64 - bits)) - 1))  # >> copies the sign bit

    keys = shifted(keys, 30) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    keys = shifted(keys, 27) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return shifted(keys, 31)
