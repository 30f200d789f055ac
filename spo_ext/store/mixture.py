"""What a sampler draws: the fractions of a batch, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from spo_ext.checks import check_integer, check_name, check_one_of, number, refuse
from spo_ext.store import schema
from spo_ext.store.records import Split

Shortage = Literal["raise", "fill"]

_NAMED = {
    "online": {"online": 1.0},
    "offline": {"offline": 1.0},
    "half-online": {"online": 0.5, "offline": 0.5},
}


@dataclass(frozen=True, slots=True)
class Stratum:
    """Rewards in [low, high), and the least fraction of what is drawn from each pool."""

    fraction: float
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        number("Stratum", "fraction", self.fraction, above=0.0, at_most=1.0)
        if not self.low < self.high:
            refuse("Stratum", "low", f"less than high {self.high}", self.low)


@dataclass(frozen=True, slots=True)
class SamplerConfig:
    """How a sampler draws.

    batch_size: trajectories in a batch.
    mixture: "online", "offline", "half-online", or a fraction for each pool; they add up to 1.
        Pools are "online" (written by the policy of `run`), "offline" (all others), "human",
        "model:NAME" and "run:NAME".
    run: the learner's own run; needed for "online".
    seed: of the order in which trajectories are drawn.
    max_offpolicy_steps: draw online only from so many policy versions back and the present one; 0
        is on-policy, None any.
    replay_versions: a replay buffer in place of max_offpolicy_steps: draw online evenly from what
        the last so many policy versions wrote, drawn before or not (arXiv 2604.08706). Without it,
        what was drawn least comes first.
    max_uses: draw a trajectory at most so often.
    strata: least fractions by reward, if there are such trajectories. They may not overlap.
    group_size: draw so many trajectories of a prompt at a time, all from one pool.
    mixed_groups: or from all pools of the mixture, by its fractions: rows of the others join online
        ones of the same prompt, those that were drawn least first. A prompt that has fewer of them
        makes a smaller group, and the batch says so in its shortfall; a pool without any is an
        error.
    split: of the prompts.
    on_shortfall: "raise" if a pool has too few trajectories, or "fill" up from the other pools
        and say so in the batch.
    """

    batch_size: int
    mixture: str | Mapping[str, float] = "online"
    run: str | None = None
    seed: int = 0
    max_offpolicy_steps: int | None = None
    replay_versions: int | None = None
    max_uses: int | None = None
    strata: Sequence[Stratum] = ()
    group_size: int = 1
    mixed_groups: bool = False
    split: Split = "train"
    on_shortfall: Shortage = "raise"

    def __post_init__(self) -> None:
        owner = "SamplerConfig"
        check_integer(owner, "batch_size", self.batch_size, 1)
        check_integer(owner, "group_size", self.group_size, 1)
        check_integer(owner, "seed", self.seed, 0)
        if self.batch_size % self.group_size:
            refuse(
                owner, "batch_size", f"a multiple of group_size {self.group_size}", self.batch_size
            )
        for name, least in (("max_offpolicy_steps", 0), ("replay_versions", 1), ("max_uses", 1)):
            if getattr(self, name) is not None:
                check_integer(owner, name, getattr(self, name), least)
        if self.replay_versions is not None and self.max_offpolicy_steps is not None:
            expected = "None with replay_versions"
            refuse(owner, "max_offpolicy_steps", expected, self.max_offpolicy_steps)
        check_one_of(owner, "split", self.split, get_args(Split))
        check_one_of(owner, "on_shortfall", self.on_shortfall, get_args(Shortage))
        if self.run is not None:
            check_name(owner, "run", self.run)
        object.__setattr__(self, "mixture", _fractions(self.mixture, self.run))
        object.__setattr__(self, "strata", tuple(self.strata))
        ranges = sorted((stratum.low, stratum.high) for stratum in self.strata)
        if any(after[0] < before[1] for before, after in zip(ranges, ranges[1:], strict=False)):
            refuse(owner, "strata", "disjoint", self.strata)
        if sum(stratum.fraction for stratum in self.strata) > 1 + 1e-9:
            refuse(owner, "strata", "of fractions that add up to at most 1", self.strata)
        if self.strata and self.group_size > 1:
            refuse(owner, "strata", "empty with group_size > 1", self.strata)
        if self.mixed_groups:
            self._check_mixed(owner)

    def _check_mixed(self, owner: str) -> None:
        fractions = self.fractions
        if "online" not in fractions or len(fractions) < 2:
            refuse(owner, "mixture", "of online and others with mixed_groups", fractions)
        for pool, fraction in fractions.items():
            rows = fraction * self.group_size
            if abs(rows - round(rows)) > 1e-6 or round(rows) < 1:
                expected = f"a whole number of rows of a mixed group of {self.group_size}"
                refuse(owner, f"mixture[{pool!r}]", expected, fraction)
        if self.on_shortfall != "raise":
            refuse(owner, "on_shortfall", "raise with mixed_groups", self.on_shortfall)

    @property
    def fractions(self) -> dict[str, float]:
        """The mixture by pool."""
        assert not isinstance(self.mixture, str)
        return dict(self.mixture)

    @property
    def oldest(self) -> int | None:
        """How many policy versions back online rows may be from; None for any."""
        if self.replay_versions is not None:
            return self.replay_versions - 1
        return self.max_offpolicy_steps

    @property
    def rows_per_group(self) -> dict[str, int]:
        """Rows of each pool in a mixed group."""
        return {pool: round(part * self.group_size) for pool, part in self.fractions.items()}

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint and the store; infinite bounds as text."""
        fields = asdict(self)
        fields["max_age"] = fields.pop("max_offpolicy_steps")  # its name in stores of before
        for name in ("mixed_groups", "replay_versions"):
            if not fields[name]:
                del fields[name]  # as samplers were stored before there were any
        fields["strata"] = [[repr(value) for value in asdict(s).values()] for s in self.strata]
        return fields


def _fractions(mixture: object, run: str | None) -> dict[str, float]:
    owner, name = "SamplerConfig", "mixture"
    if isinstance(mixture, str):
        check_one_of(owner, name, mixture, _NAMED)
        mixture = _NAMED[mixture]
    if not isinstance(mixture, Mapping) or not mixture:
        refuse(owner, name, f"a fraction by pool, or one of {', '.join(_NAMED)}", mixture)
    fractions = {
        pool: number(owner, f"{name}[{pool!r}]", fraction, above=0.0, at_most=1.0)
        for pool, fraction in sorted(mixture.items())
    }
    if abs(sum(fractions.values()) - 1) > 1e-9:
        refuse(owner, name, "fractions that add up to 1", dict(mixture))
    for pool in fractions:
        kind, _, of = pool.partition(":")
        if pool not in ("online", "offline", "human") and not (kind in ("model", "run") and of):
            refuse(owner, name, "of pools online, offline, human, model:NAME or run:NAME", pool)
        if pool == f"run:{run}":
            refuse(owner, name, "online for the sampler's own run", pool)
    if "offline" in fractions and set(fractions) - {"online", "offline"}:
        refuse(owner, name, "offline or parts of it, not both", dict(mixture))
    if "online" in fractions and run is None:
        refuse(owner, "run", "given for a mixture with online", None)
    return fractions


def pool_condition(pool: str, run: str | None) -> sa.ColumnElement[bool]:
    """Which trajectories are in the pool; those of one mixture share none."""
    table = schema.trajectories.c
    own = sa.and_(table.kind == "policy", table.run == run) if run is not None else sa.false()
    kind, _, name = pool.partition(":")
    if pool == "online":
        return own
    if pool == "offline":
        return sa.or_(table.kind != "policy", table.run != run) if run is not None else sa.true()
    if pool == "human":
        return table.kind == "human"
    if kind == "model":
        return sa.and_(table.kind == "model", table.model == name)
    return sa.and_(table.kind == "policy", table.run == name)
