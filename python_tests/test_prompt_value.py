"""prompt_value: each estimator against its formula, smoothing, counts and refusals."""

import math
import warnings

import pytest
import torch

import spo_ext
from spo_ext import prompt_value


def test_reference_is_log_mean_exp():
    rewards = torch.tensor([[0.0, -1.0, -1.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    value, n = prompt_value(rewards, beta=0.5, return_n=True)
    want = [0.5 * math.log((2 + 2 * math.exp(-2)) / 4), 0.5 * math.log((3 + math.exp(-2)) / 4)]
    assert value.tolist() == pytest.approx(want) and n.tolist() == [4, 4]
    assert value.dtype == torch.float32 and n.dtype == torch.int64
    shuffled = torch.randperm(8)
    groups = torch.arange(2).repeat_interleave(4)
    again = prompt_value(rewards.flatten()[shuffled], beta=0.5, groups=groups[shuffled])
    torch.testing.assert_close(again, value)


def test_reference_does_not_overflow():
    value = prompt_value(torch.tensor([[1000.0, 999.0]]), beta=0.01)
    assert value.item() == pytest.approx(1000 - 0.01 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    "rewards, beta",
    [
        ([[1.0, 1.0], [0.0, 0.0]], 0.001),
        ([[12.0, 11.0], [-15.0, -14.0]], 0.03),
        ([[1e9, 1e9], [0.0, 1.0], [-1e9, -math.inf]], 1e-6),
    ],
)
def test_a_prompt_is_shifted_by_its_own_rewards(rewards, beta):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = prompt_value(rewards, beta=beta)
        alone = torch.cat([prompt_value(row, beta=beta) for row in rewards])
    top = rewards.max(1).values
    want = top + beta * ((rewards == top[:, None]).sum(1) / 2).log()
    assert torch.equal(value, alone)
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)


def test_smoothing_at_a_small_beta():
    """(k + s) / (n + 2 s) of the best reward, and nothing of the worst."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    value = prompt_value(rewards, beta=1e-3, smoothing=0.5)
    assert value.tolist() == pytest.approx([1 + 1e-3 * math.log(p / 3) for p in (1.5, 0.5)])


def test_a_large_beta_gives_the_mean():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [3.0, 3.0, 0.0]])
    assert prompt_value(rewards, beta=1e9).tolist() == pytest.approx([0.5, 2.0], rel=1e-6)


def test_leave_one_out_of_an_impossible_reward():
    rewards = torch.tensor([0.0, -math.inf, -1.0])
    value = prompt_value(rewards, beta=0.1, estimator="leave_one_out")
    assert value.tolist() == [-math.inf, -0.5, -math.inf]
    huge = torch.tensor([1e30, 1.0, 2.0])  # a total less itself would leave 0
    assert prompt_value(huge, beta=1.0, estimator="leave_one_out")[0] == 1.5


def test_optimal_policy_is_solved():
    """At the exact Q_0 and the optimal policy pi_ref exp((r - Q_0) / beta), the residual Q_T - r
    is zero."""
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rewards, beta = torch.tensor([-1.0, 0.0, -0.3], dtype=torch.float64), 0.7
    counts = (ref * 10).round().long()
    q0 = prompt_value(rewards.repeat_interleave(counts), beta=beta).double()
    optimal = ref.log() + (rewards - q0) / beta
    assert optimal.exp().sum().item() == pytest.approx(1.0, rel=1e-6)
    loss = spo_ext.loss(
        optimal[:, None],
        ref.log()[:, None],
        rewards,
        q0.expand(3).clone(),
        beta=beta,
        objective="squared",
    )
    assert loss.item() < 1e-12


def test_zero_successes_warn_or_refuse_and_smoothing_answers():
    binary = torch.tensor([[0.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    with pytest.warns(UserWarning, match="1 of 2 prompts had only the worst reward"):
        assert prompt_value(binary, beta=0.1)[1] == -1
    logs = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]])
    with pytest.raises(ValueError, match="0 of n samples succeeded .* pass smoothing=0.5"):
        prompt_value(logs, beta=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smooth = prompt_value(logs, beta=1.0, smoothing=0.5)
        assert smooth.tolist() == pytest.approx([math.log(1.5 / 3), math.log(0.5 / 3)])
        p = 0.5 / 5  # (k + s) / (n + 2 s)
        want = 0.1 * math.log(p + (1 - p) * math.exp(-10))
        assert prompt_value(binary, beta=0.1, smoothing=0.5)[1].item() == pytest.approx(
            want, rel=1e-6
        )
    with pytest.raises(ValueError, match="reward_range must be .worst, best."):
        prompt_value(binary[1:], beta=0.1, smoothing=0.5)
    ranged = prompt_value(binary[1:], beta=0.1, smoothing=0.5, reward_range=(-1.0, 0.0))
    assert ranged.item() == pytest.approx(want, rel=1e-6)


def test_group_and_leave_one_out():
    rewards = torch.tensor([0.0, -1.0, -1.0, 0.0])
    log_ratios = torch.tensor([1.0, -1.0, 0.5, 2.0])
    groups = torch.tensor([0, 0, 0, 1])
    gain = (rewards - 0.2 * log_ratios).tolist()
    arguments = dict(beta=0.2, groups=groups, log_ratios=log_ratios, return_n=True)
    value, n = prompt_value(rewards, estimator="group", **arguments)
    assert value.tolist() == pytest.approx([sum(gain[:3]) / 3, gain[3]]) and n.tolist() == [3, 1]
    value, n = prompt_value(rewards, estimator="leave_one_out", **arguments)
    want = [(gain[1] + gain[2]) / 2, (gain[0] + gain[2]) / 2, (gain[0] + gain[1]) / 2, gain[3]]
    assert value.tolist() == pytest.approx(want) and n.tolist() == [2, 2, 2, 0]


def test_group_value_is_the_baseline_of_the_group_objective():
    logprobs, ref = torch.randn(6, 4), torch.randn(6, 4)
    rewards, groups = torch.randn(6), torch.tensor([0, 0, 1, 1, 1, 2])
    _, stats = spo_ext.loss(
        logprobs, ref, rewards, None, beta=0.3, objective="group", groups=groups, return_stats=True
    )
    value = prompt_value(
        rewards, beta=0.3, groups=groups, estimator="group", log_ratios=stats.log_ratio
    )
    torch.testing.assert_close(value[groups], stats.q0)


def test_ema_keeps_prompts_without_samples():
    value, n = prompt_value(
        torch.tensor([-1.0, 0.0]),
        beta=1.0,
        groups=torch.tensor([2, 2]),
        num_prompts=3,
        estimator="ema",
        previous=torch.tensor([-0.1, -0.2, -0.3]),
        decay=0.75,
        return_n=True,
    )
    assert value.tolist() == pytest.approx(
        [-0.1, -0.2, 0.75 * -0.3 + 0.25 * -0.5]
    ) and n.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(estimator="median"),
            "estimator must be reference, group, leave_one_out or ema, got 'median'",
        ),
        (dict(beta=0.0), "beta must be a finite number > 0, got 0.0"),
        (dict(smoothing=-1.0), "smoothing must be >= 0"),
        (dict(smoothing=math.nan), "smoothing must be >= 0, .* got nan"),
        (dict(smoothing=math.inf), "smoothing must be >= 0, .* got inf"),
        (dict(beta=math.nan), "beta must be a finite number > 0, got nan"),
        (dict(beta=torch.ones(1, requires_grad=True)), "beta must not require grad"),
        (dict(decay=0.5), "decay must be left out unless estimator is ema, got 0.5"),
        (dict(estimator="ema", previous=torch.full((1,), math.nan)), "previous must be finite"),
        (dict(num_prompts=3), "num_prompts must be None without groups, got 3"),
        (dict(groups=torch.zeros(4).long(), num_prompts=1.5), "num_prompts must be a whole number"),
        (dict(groups=torch.zeros(4)), "groups must be integers of shape .* got torch.float32"),
        (dict(groups=torch.zeros(4).bool()), "groups must be integers of shape .* got torch.bool"),
        (dict(reward_range=(0.0, 1.0), estimator="group"), "reward_range must be None unless"),
        (dict(reward_range=(math.nan, 1.0)), "reward_range must be .worst, best."),
        (dict(reward_range=(0.0,)), "reward_range must be .worst, best., got .0.0,."),
        (
            dict(reward_range=(-0.5, 0.0), groups=torch.tensor([0, 1, 1, 1])),
            r"rewards must lie in reward_range .-0.5, 0.0., got -1.0 for prompt 1",
        ),
        (dict(rewards=torch.full((4,), math.inf)), "rewards must be finite or -inf"),
        (
            dict(estimator="group", log_ratios=torch.tensor([0.0, 0.0, math.nan, 0.0])),
            "log_ratios must be finite, got nan or inf",
        ),
        (dict(smoothing=0.5, estimator="group"), "and 0 unless estimator is reference"),
        (dict(log_ratios=torch.zeros(4)), "log_ratios must be None"),
        (
            dict(previous=torch.zeros(1)),
            "previous must be given for ema and None otherwise, got a tensor",
        ),
        (dict(estimator="ema"), "previous must be given for ema and None otherwise, got None"),
        (
            dict(estimator="ema", previous=torch.zeros(1), decay=1.0),
            r"decay must be in \[0, 1\), got 1.0",
        ),
        (dict(groups=torch.zeros(3).long()), r"groups must be integers of shape \[4\]"),
        (
            dict(groups=torch.tensor([0, 1, 2, 5]), num_prompts=4),
            r"groups must be in \[0, 4\), got 0..5",
        ),
        (dict(groups=torch.tensor([0, 0, 2, 2])), "every prompt must have a sample"),
        (dict(rewards=torch.full((4,), math.nan)), "rewards must be finite or -inf, got nan"),
    ],
)
def test_refuses(arguments, message):
    given = dict(rewards=torch.tensor([0.0, -1.0, 0.0, -1.0]), beta=1.0) | arguments
    with pytest.raises((ValueError, TypeError), match=f"^prompt_value: .*{message}"):
        prompt_value(given.pop("rewards"), **given)
