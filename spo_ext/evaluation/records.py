"""What an evaluation drew, what came of it, and the table that `spo eval` prints."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from spo_ext.metrics import distinct_correct, pass_at_k
from spo_ext.rollout.generation import Generation, Judgement
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


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion and its text; judgement is None if it could not be judged."""

    generation: Generation
    text: str
    judgement: Judgement | None

    def passed(self, success: float) -> bool:
        return self.judgement is not None and self.judgement.reward >= success


@dataclass(frozen=True)
class Evaluation:
    """The samples of each prompt; one passed if its reward is at least `success`."""

    samples: tuple[tuple[Sample, ...], ...]
    ks: tuple[int, ...]
    success: float

    @property
    def counts(self) -> list[tuple[int, int]]:
        """For each prompt how many samples were judged, and how many of them passed."""
        return [
            (
                sum(sample.judgement is not None for sample in row),
                sum(sample.passed(self.success) for sample in row),
            )
            for row in self.samples
        ]

    @property
    def unjudged(self) -> int:
        """Samples that count neither as passed nor as failed."""
        return sum(sample.judgement is None for row in self.samples for sample in row)

    def values(self) -> dict[str, Estimate]:
        """pass@k; and per prompt, averaged: reward, truncated share, num_tokens.

        rewards/NAME/mean is of each of several rewards. distinct_correct is the number of different
        correct texts of a prompt that has any. What no prompt has an estimate of is left out.
        """
        columns = {
            "reward": [_mean(_rewards(row)) for row in self.samples if _rewards(row)],
            "truncated": [
                _mean([float(sample.generation.finish == "truncated") for sample in row])
                for row in self.samples
            ],
            "num_tokens": [
                _mean([float(sample.generation.num_policy_tokens) for sample in row])
                for row in self.samples
            ],
            "distinct_correct": [float(count) for count in self._distinct() if count],
        }
        found = {f"pass@{k}": pass_estimate(self.counts, k) for k in self.ks}
        for name in dict.fromkeys(name for row in self.samples for name in _parts(row)):
            each = [_mean(_parts(row)[name]) for row in self.samples if name in _parts(row)]
            columns[f"rewards/{name}/mean"] = each
        found |= {name: estimate(column) for name, column in columns.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _distinct(self) -> list[int]:
        return [
            distinct_correct(
                [sample.text for sample in row], [sample.passed(self.success) for sample in row]
            )
            for row in self.samples
        ]


def _rewards(row: Sequence[Sample]) -> list[float]:
    return [sample.judgement.reward for sample in row if sample.judgement is not None]


def _parts(row: Sequence[Sample]) -> dict[str, list[float]]:
    """Of a sum of several rewards what each gave, by name."""
    found: dict[str, list[float]] = {}
    for sample in row:
        for name, reward in () if sample.judgement is None else sample.judgement.parts:
            found.setdefault(name, []).append(reward)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
    lines = [aligned(rows)]
    if evaluation.unjudged:
        total = sum(map(len, evaluation.samples))
        lines.append(f"{evaluation.unjudged} of {total} completions could not be judged")
    return "\n".join(lines)


def compared(values: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Values of several evaluations by name, as `summary` has them, side by side as aligned text.

    What the first does not have is left out; the last column is the change from it to the last.
    """
    first, last = list(values.values())[0], list(values.values())[-1]
    several = len(values) > 1
    rows = [("", *values, *["change"] * several)]
    for name in first:
        cells = [f"{of[name]['mean']:.3f}" if name in of else "" for of in values.values()]
        if several:
            moved = name in last
            cells.append(f"{last[name]['mean'] - first[name]['mean']:+.3f}" if moved else "")
        rows.append((label(name), *cells))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        first.ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("spo_ext", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
