"""Means over prompts and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from spo_ext.metrics import pass_at_k

RESAMPLES = 2000
_CHUNK = 1 << 20  # resampled values in memory at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, with the bounds of its 95% bootstrap interval over them.

    The bounds are None for fewer than two prompts, which say nothing about others.
    """

    mean: float
    low: float | None
    high: float | None
    prompts: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float]) -> Estimate | None:
    """One value per prompt; the same values give the same interval. None for no prompt."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, None, len(values))
    table = torch.tensor(values, dtype=torch.float64, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(0)
    rows = max(1, _CHUNK // len(values))
    means = []
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), len(values))
        means.append(table[torch.randint(len(values), shape, generator=generator)].mean(1))
    return Estimate(mean, *bounds(torch.cat(means)), len(values))


def bounds(means: torch.Tensor) -> tuple[float, float]:
    """Of the 95% interval; means: [RESAMPLES], of as many resamples."""
    ordered = means.sort().values.tolist()
    # Order statistics, not interpolated: a reward may be -inf.
    tail = round(0.025 * len(ordered))
    return ordered[tail], ordered[-tail - 1]


def pass_estimate(counts: Iterable[tuple[int, int]], k: int) -> Estimate | None:
    """pass@k from (samples, correct) of each prompt.

    A prompt with fewer than k samples has no unbiased estimate and is left out.
    """
    return estimate([pass_at_k(n, correct, k) for n, correct in counts if n >= k])
