"""Differences whose intervals are over problems as well as over seeds.

Seeds say how a method would do if it were trained again and asked the same problems; whether it is
the better one on other problems of the kind takes both.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from spo_ext.contests.problems import Split
from spo_ext.evaluation.records import RESAMPLES, Estimate, bounds
from spo_ext.metrics import pass_at_k

from .settings import setting_named
from .tables import Record, Series, last


def difference_over_problems(series: Series, control: Series, k: int) -> Estimate | None:
    """Mean of series - control at pass@k over the pairs of runs that both have.

    The 95% bootstrap interval draws pairs of runs and problems at once, each with replacement
    (Owen 2007, "The pigeonhole bootstrap"); problems with the same specification are drawn
    together. None without two pairs, or where the runs do not say what they passed of the problems
    that their setting has now.
    """
    ours, theirs = series.by_pair, control.by_pair
    pairs = sorted(ours.keys() & theirs.keys())
    if len(pairs) < 2:
        return None
    first = ours[pairs[0]]
    groups = _groups(first["setting"], first["split"])
    runs = [side[pair] for side in (ours, theirs) for pair in pairs]
    if any(len(last(run).get("correct", ())) != len(groups) for run in runs):
        return None
    passed = torch.stack([_passed(ours[pair], k) - _passed(theirs[pair], k) for pair in pairs])
    index = torch.tensor(groups)
    count = int(index.max()) + 1
    sums = passed.new_zeros(len(pairs), count).index_add_(1, index, passed)
    sizes = torch.bincount(index, minlength=count).double()
    generator = torch.Generator().manual_seed(0)
    of_pairs = _draws(len(pairs), generator)
    of_groups = _draws(count, generator)
    totals = ((of_pairs @ sums) * of_groups).sum(1)
    means = totals / (len(pairs) * (of_groups @ sizes))
    return Estimate(float(passed.mean()), *bounds(means), len(groups))


@cache
def _groups(setting: str, split: Split) -> list[int]:
    """Of each held-out problem, the number of its specification."""
    numbers: dict[object, int] = {}
    problems = setting_named(setting).problems(split, 0)
    return [numbers.setdefault(p.specification, len(numbers)) for p in problems]


def _passed(run: Record, k: int) -> Tensor:
    """pass@k of each problem, after the last step."""
    point = last(run)
    samples = len(point["pass_at"])
    return torch.tensor([pass_at_k(samples, n, k) for n in point["correct"]], dtype=torch.float64)


def _draws(count: int, generator: torch.Generator) -> Tensor:
    """float64 [resamples, count]: how often each of so many is drawn."""
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    ones = torch.ones_like(drawn, dtype=torch.float64)
    return torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add_(1, drawn, ones)
