"""What an evaluation drew and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spo_ext.evaluation.summary import Estimate, estimate, pass_estimate
from spo_ext.metrics import distinct_correct
from spo_ext.rollout.generation import Generation, Judgement


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
                _mean([float(len(sample.generation.token_ids)) for sample in row])
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
