"""evaluation.json, and the table that `spo eval` prints."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from spo_ext.evaluation.records import Evaluation
from spo_ext.metrics import pass_at_k
from spo_ext.store.records import StoredPrompt

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


_VALUES = {
    "reward": "mean reward",
    "truncated": "share truncated",
    "num_tokens": "mean length, tokens",
    "distinct_correct": "distinct correct completions per solved prompt",
}


def summary(
    evaluation: Evaluation, settings: Mapping[str, Any], prompts: Sequence[StoredPrompt]
) -> dict[str, Any]:
    """As JSON: settings, values with their intervals, and of each prompt n (judged) and c (passed).

    From the last of these pass@k for every k can be computed again.
    """
    return {
        "settings": dict(settings),
        "k": list(evaluation.ks),
        "success": evaluation.success,
        "values": {name: asdict(value) for name, value in evaluation.values().items()},
        "completions": sum(map(len, evaluation.samples)),
        "unjudged": evaluation.unjudged,
        "per_prompt": [
            {"prompt_id": prompt.id, "n": judged, "c": passed}
            for prompt, (judged, passed) in zip(prompts, evaluation.counts, strict=True)
        ],
        "versions": _versions(),
    }


def label(name: str) -> str:
    """What to call a value of `Evaluation.values`."""
    return _VALUES.get(name, name)


def table(evaluation: Evaluation) -> str:
    """As aligned text."""
    rows = [("", "mean", "95% interval", "prompts")]
    for name, value in evaluation.values().items():
        interval = "" if value.low is None else f"[{value.low:.3f}, {value.high:.3f}]"
        rows.append((label(name), f"{value.mean:.3f}", interval, str(value.prompts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        first.ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    ]
    if evaluation.unjudged:
        total = sum(map(len, evaluation.samples))
        lines.append(f"{evaluation.unjudged} of {total} completions could not be judged")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("spo_ext", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
