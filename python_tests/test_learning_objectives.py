"""The SPO loss of each baseline against its formula, in float64."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sqlalchemy")

from learning.feed import Rows
from learning.methods import METHODS
from learning.objectives import SpoObjective

from spo_ext.trainer.batches import TokenBatch

BETA = 0.2
SIZES = [2, 1, 3, 2, 1]
GROUPS = torch.tensor([0, 0, 0, 3, 3])
REWARDS = torch.tensor([0.0, -1.0, 0.0, -1.0, -1.0])
ONLINE = torch.tensor([True, True, False, True, True])
SPLIT = torch.tensor([0, *SIZES]).cumsum(0)


def case():
    """log-probabilities of the policy [9], the rows, and the log-ratios [5]."""
    torch.manual_seed(3)
    logprobs = -torch.rand(9, dtype=torch.float64)
    ref, behaviour = -torch.rand(9, dtype=torch.float64), -torch.rand(9, dtype=torch.float64)
    behaviour[3:6] = torch.nan  # the offline one
    tokens = TokenBatch({}, torch.arange(9), torch.zeros(9, dtype=torch.int64), SPLIT)
    rows = Rows(tokens, ref, behaviour, REWARDS.double(), GROUPS, ONLINE)
    ratios = torch.stack([part.sum() for part in (logprobs - ref).split(SIZES)])
    return logprobs.requires_grad_(), rows, ratios


def group_mean(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    means = [values[(GROUPS == g) & keep].mean() for g in GROUPS.tolist()]
    return torch.stack(means)


def test_a_natural_baseline_counts_rows_by_their_shares():
    logprobs, rows, ratios = case()
    shares = torch.tensor([0.2, 0.5, 0.3, 0.9, 0.1], dtype=torch.float64)
    method = replace(METHODS["group"], baseline="natural", beta=BETA, taper=False)
    loss, _, _ = SpoObjective(method, None).loss(logprobs, replace(rows, shares=shares))
    gain = rows.rewards - BETA * ratios
    q0 = 2 * group_mean(shares * gain, ONLINE | True)
    q0 = torch.where(GROUPS == GROUPS[0], q0 * 1.5, q0)  # three rows and two
    assert loss.item() == pytest.approx(float((q0 - gain).square().mean() / (2 * BETA)), rel=1e-6)


@pytest.mark.parametrize("objective", ["squared", "group"])
@pytest.mark.parametrize("baseline", ["group", "online_group", "leave_one_out"])
def test_group_baselines(objective, baseline):
    logprobs, rows, ratios = case()
    method = replace(
        METHODS["squared"], objective=objective, baseline=baseline, beta=BETA, taper=False
    )
    loss, stats, weights = SpoObjective(method, None).loss(logprobs, rows)
    gain = rows.rewards - BETA * ratios
    if baseline == "leave_one_out":
        count = torch.tensor([3.0, 3, 3, 2, 2], dtype=torch.float64)
        total = group_mean(gain, torch.ones(5, dtype=torch.bool)) * count
        q0 = (total - gain) / (count - 1)
    else:
        q0 = group_mean(gain, ONLINE if baseline == "online_group" else ONLINE | True)
    expected = (q0 - gain).square().mean() / (2 * BETA)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert weights.tolist() == [1.0] * 5
    loss.backward()
    # d/dlogprob of (Q_T - r)^2 / (2 beta) is Q_T - r for every token of the program.
    slopes = torch.repeat_interleave((q0 - gain) / 5, torch.tensor(SIZES))
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-5, atol=1e-7)


def test_weights_taper_failures_and_favour_rare_success():
    logprobs, rows, _ = case()
    method = replace(METHODS["group-rare"], rare_power=2.0, beta=BETA)
    _, _, weights = SpoObjective(method, None).loss(logprobs, rows)
    sums = torch.stack([part.sum() for part in logprobs.detach().split(SIZES)])
    behaviour = torch.stack([part.sum() for part in rows.behaviour_logprobs.split(SIZES)])
    fading = (sums - behaviour).clamp(max=0).exp()
    # One of two sampled programs of the first group passed, none of the second.
    expected = [0.25, 0.25 * fading[1], 0.25, fading[3], fading[4]]
    assert weights.tolist() == pytest.approx([float(value) for value in expected], rel=1e-6)
    assert not torch.allclose(fading[[1, 3, 4]], torch.ones(3, dtype=torch.float64))


def test_a_program_may_weigh_by_its_length():
    logprobs, rows, _ = case()
    method = replace(METHODS["group"], per_token=True, taper=False)
    _, _, weights = SpoObjective(method, None).loss(logprobs, rows)
    assert weights.tolist() == pytest.approx([1.8 / size for size in SIZES])


def test_a_large_residual_has_the_slope_of_one_that_is_straight_from():
    logprobs, rows, ratios = case()
    gain = REWARDS.double() - BETA * ratios.detach()
    residual = group_mean(gain, torch.ones(5, dtype=torch.bool)) - gain
    bound = residual.abs().median()
    method = replace(METHODS["group"], beta=BETA, taper=False, straight_from=float(bound))
    loss, _, _ = SpoObjective(method, None).loss(logprobs, rows)
    loss.backward()
    slopes = torch.repeat_interleave(residual.clamp(-bound, bound) / 5, torch.tensor(SIZES))
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-5, atol=1e-7)
    assert (residual.abs() > bound).sum() == 2


def test_running_values_start_at_the_reference_and_move_half_way():
    logprobs, rows, ratios = case()
    sampled = torch.tensor([[0.0, -1.0], [-1.0, -1.0], [0.0, 0.0], [-1.0, 0.0]])
    method = replace(METHODS["squared-running"], beta=BETA, taper=False)
    objective = SpoObjective(method, sampled)
    half_and_half = torch.exp(torch.tensor([0.0, -1.0], dtype=torch.float64) / BETA)
    first = BETA * (half_and_half * torch.tensor([1.5, 1.5])).sum().div(3).log()
    _, stats, _ = objective.loss(logprobs, rows)
    gain = rows.rewards - BETA * ratios
    everyone = torch.ones(5, dtype=torch.bool)
    moved = 0.5 * first + 0.5 * group_mean(gain, everyone)
    assert stats.q0.tolist() == pytest.approx(moved.tolist(), rel=1e-5)
    _, stats, _ = objective.loss(logprobs, rows)
    again = 0.5 * moved + 0.5 * group_mean(gain, everyone)
    assert stats.q0.tolist() == pytest.approx(again.tolist(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:prompt_value")
def test_monte_carlo_values_with_and_without_smoothing():
    logprobs, rows, _ = case()
    sampled = torch.tensor([[0.0, -1.0], [-1.0, -1.0], [0.0, 0.0], [-1.0, -1.0]])
    worst = float(torch.exp(torch.tensor(-1.0 / BETA, dtype=torch.float64)))
    log = torch.log(torch.tensor([(1 + worst) / 2, worst, (1.5 + 1.5 * worst) / 3,
                                  (0.5 + 2.5 * worst) / 3], dtype=torch.float64))  # fmt: skip
    raw, smoothed = BETA * log[:2], BETA * log[2:]
    for name, (first, other) in {"squared-raw": raw, "squared": smoothed}.items():
        method = replace(METHODS[name], beta=BETA, taper=False)
        _, stats, _ = SpoObjective(method, sampled).loss(logprobs, rows)
        expected = [float(first)] * 3 + [float(other)] * 2
        assert stats.q0.tolist() == pytest.approx(expected, rel=1e-5)


def test_beta_moves_in_equal_ratios():
    method = replace(METHODS["group"], beta=0.4, final_beta=0.1)
    assert [method.beta_at(share) for share in (0, 0.5, 1)] == pytest.approx([0.4, 0.2, 0.1])
    assert METHODS["group"].beta_at(0.7) == METHODS["group"].beta
    logprobs, rows, ratios = case()
    moved, plain = SpoObjective(method, None), SpoObjective(replace(method, beta=0.2), None)
    moved.beta = 0.2
    assert moved.loss(logprobs, rows)[0].item() == plain.loss(logprobs, rows)[0].item()


def test_values_may_have_a_softness_of_their_own():
    logprobs, rows, ratios = case()
    rewards = torch.tensor([[0.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    method = replace(METHODS["squared-raw"], beta=0.5, value_beta=0.1, taper=False)
    loss, stats, _ = SpoObjective(method, rewards).loss(logprobs, rows)
    value = 0.1 * math.log((1 + math.exp(-10)) / 2)
    assert stats.q0.tolist() == pytest.approx([value if g == 0 else 0 for g in GROUPS.tolist()])
    terminal = stats.q0 + 0.5 * ratios
    assert loss.item() == pytest.approx(float((terminal - rows.rewards).square().mean()), rel=1e-6)


def test_equal_programs_of_a_group_count_as_one():
    """Rows 0 and 2 are the same program; row 3 is too, but of another problem."""
    logprobs, rows, ratios = case()
    sizes = [2, 1, 2, 2, 2]
    tokens = replace(
        rows.tokens,
        targets=torch.tensor([7, 8, 9, 7, 8, 7, 8, 5, 5]),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0),
    )
    rows = replace(rows, tokens=tokens)
    ratios = torch.stack([part.sum() for part in (logprobs - rows.ref_logprobs).split(sizes)])
    method = replace(METHODS["group"], baseline="distinct", beta=BETA, taper=False)
    loss, _, weights = SpoObjective(method, None).loss(logprobs, rows)
    assert weights.tolist() == [0.5, 1, 0.5, 1, 1]
    gain = rows.rewards - BETA * ratios
    first = (gain[0] / 2 + gain[1] + gain[2] / 2) / 2
    q0 = torch.stack([first, first, first, *[gain[3:].mean()] * 2])
    expected = (weights * (q0 - gain).square()).mean() / (2 * BETA)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
