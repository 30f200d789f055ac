"""Every series of the trainer's log against its definition, computed in float64 from all rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator

import spo_ext
from spo_ext import LossStats
from spo_ext.trainer.metrics import Meter, add_loss, add_tokens

BETA = 0.5
# Sequences of each micro-batch, by their lengths: unequal in number and in tokens.
MICRO_BATCHES = ((3, 1, 6), (2,), (5, 4, 1, 1))


class Case:
    """Tokens and sequences of one micro-batch, float64."""

    def __init__(self, lengths: Sequence[int], rng: torch.Generator) -> None:
        tokens, rows = sum(lengths), len(lengths)
        draw = lambda size: torch.randn(size, generator=rng, dtype=torch.float64)  # noqa: E731
        self.lengths = torch.tensor(lengths)
        self.ref_logprobs = draw(tokens) - 2
        self.logprobs = self.ref_logprobs + draw(tokens) / 3
        self.entropy = draw(tokens).abs()
        self.rewards = torch.randint(0, 3, (rows,), generator=rng).double() - 1
        self.q0 = draw(rows) / 2 - 0.9
        self.q0[0] = -1.25  # below every reward
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    @property
    def log_ratios(self) -> Tensor:
        parts = (self.logprobs - self.ref_logprobs).split(self.lengths.tolist())
        return torch.stack([part.sum() for part in parts])

    @property
    def terminal_q(self) -> Tensor:
        return self.q0 + BETA * self.log_ratios

    def add_to(self, meter: Meter, objective: Any = "squared") -> None:
        _, stats = spo_ext.loss(
            self.logprobs,
            self.ref_logprobs,
            self.rewards,
            self.q0,
            beta=BETA,
            objective=objective,
            cu_seqlens=self.cu_seqlens,
            reduction="sum",
            return_stats=True,
        )
        add_tokens(meter, self.logprobs, self.ref_logprobs, self.entropy)
        add_loss(meter, stats, self.rewards, -1.0)


def cases() -> list[Case]:
    rng = torch.Generator().manual_seed(5)
    return [Case(lengths, rng) for lengths in MICRO_BATCHES]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def over_all(name: str) -> list[float]:
    return [float(value) for case in cases() for value in getattr(case, name)]


def expected() -> dict[str, float]:
    """By the definitions, in plain Python."""
    policy, ref = over_all("logprobs"), over_all("ref_logprobs")
    q, r = over_all("terminal_q"), over_all("rewards")
    q0, lengths = over_all("q0"), over_all("lengths")
    mean = lambda values: math.fsum(values) / len(values)  # noqa: E731
    mean_q, mean_r = mean(q), mean(r)
    both = [(a - mean_q) * (b - mean_r) for a, b in zip(q, r, strict=True)]
    k3 = [math.exp(b - a) - (b - a) - 1 for a, b in zip(policy, ref, strict=True)]
    return {
        "kl": mean(k3),
        "entropy": mean(over_all("entropy")),
        "store/length": mean(lengths),
        "store/reward": mean_r,
        "store/reward_std": mean([(b - mean_r) ** 2 for b in r]) ** 0.5,
        "spo/log_ratio": mean(over_all("log_ratios")),
        "spo/terminal_q": mean_q,
        "spo/q0": mean(q0),
        "spo/q0_at_floor": sum(value <= -1.0 for value in q0) / len(q0),
        "spo/clipped": sum(value > 0 for value in q) / len(q),
        "spo/residual": mean([a - b for a, b in zip(q, r, strict=True)]),
        "spo/residual_abs": mean([abs(a - b) for a, b in zip(q, r, strict=True)]),
        "spo/calibration": sum(both) / sum((a - mean_q) ** 2 for a in q),
    }


def test_every_series_is_a_mean_over_all_tokens_or_sequences(accelerator: Accelerator) -> None:
    """Not a mean of the micro-batches' means, which their unequal sizes would change."""
    meter = Meter()
    for case in cases():
        case.add_to(meter)
    found, want = meter.drain(accelerator), expected()
    assert found.keys() == want.keys()
    assert 0 < want["spo/clipped"] < 1 and 0 < want["spo/q0_at_floor"] < 1
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_draining_begins_a_new_interval(accelerator: Accelerator) -> None:
    meter, alone = Meter(), Meter()
    first, second, third = cases()
    first.add_to(meter)
    meter.put({"time/batch": 8.0})
    meter.drain(accelerator)
    for case in (second, third):
        case.add_to(meter)
        case.add_to(alone)
    assert meter.drain(accelerator) == alone.drain(accelerator)
    assert meter.drain(accelerator) == {}


def test_numbers_of_a_step_are_averaged_over_steps(accelerator: Accelerator) -> None:
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.put({"store/reuse": value})
    meter.put({"store/age_versions": 4.0})  # of one step alone
    assert meter.drain(accelerator) == {"store/reuse": 3.0, "store/age_versions": 4.0}


def test_a_step_without_a_number_does_not_count(accelerator: Accelerator) -> None:
    meter = Meter()
    meter.put({"a": 3.0, "b": math.nan})
    meter.put({"a": math.nan, "b": math.nan})
    assert meter.drain(accelerator) == {"a": 3.0}


def test_calibration_is_the_slope(accelerator: Accelerator) -> None:
    """A reward that is 3 Q_T - 1 has slope 3; with one Q_T alone there is no slope."""
    meter = Meter()
    for q in (torch.tensor([-1.0, 0.5]), torch.tensor([2.0])):
        add_loss(meter, stats_of(q), 3 * q - 1, 0.0)
    assert meter.drain(accelerator)["spo/calibration"] == pytest.approx(3.0)
    add_loss(meter, stats_of(torch.tensor([0.25, 0.25])), torch.tensor([0.0, 1.0]), 0.0)
    assert "spo/calibration" not in meter.drain(accelerator)


def stats_of(terminal_q: Tensor) -> LossStats:
    zeros = torch.zeros_like(terminal_q)
    return LossStats(zeros, terminal_q, zeros, zeros, zeros + 1, None)


def test_no_chance_of_success_makes_no_nan(accelerator: Accelerator) -> None:
    """Log-optimality -inf: the row counts wherever its number is finite, and only there."""
    meter = Meter()
    for case in cases():
        case.rewards = case.rewards.clamp(max=0)
        case.rewards[0] = -math.inf
        case.add_to(meter, "cross_entropy")
    found, want = meter.drain(accelerator), expected()
    assert all(math.isfinite(value) for value in found.values()), found
    left = [float(r) for case in cases() for r in case.rewards.clamp(max=0)[1:]]
    assert found["store/reward"] == pytest.approx(sum(left) / len(left))
    assert found["spo/terminal_q"] == pytest.approx(want["spo/terminal_q"], rel=1e-6)
    residuals = []
    for case in cases():
        rewards = case.rewards.clamp(max=0)
        rewards[0] = -math.inf
        policy = [math.exp(min(0.0, float(q) / BETA)) for q in case.terminal_q]
        residuals += [p - math.exp(float(r) / BETA) for p, r in zip(policy, rewards, strict=True)]
    assert found["spo/residual"] == pytest.approx(sum(residuals) / len(residuals), rel=1e-5)
