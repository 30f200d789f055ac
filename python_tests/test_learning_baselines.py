"""The controls' losses against hand computations, in float64."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from learning import baselines

D = torch.float64


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=D)


def test_padded_puts_every_program_in_a_row_of_its_own():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=D, requires_grad=True)
    found, mask = baselines.padded(values, torch.tensor([0, 1, 4]))
    assert found.tolist() == [[1, 0, 0], [2, 3, 4]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    (found * torch.tensor([[5.0, 9, 9], [6, 7, 8]], dtype=D)).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [5, 6, 7, 8]


def test_likelihood_is_a_mean_over_the_tokens_of_kept_programs():
    logprobs = torch.tensor([[-1.0, -2.0], [-8.0, -9.0], [-3.0, 0.0]], dtype=D)
    mask = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]], dtype=D)
    keep = torch.tensor([1.0, 0.0, 1.0], dtype=D)
    loss = baselines.likelihood_loss(logprobs, mask, keep)
    assert loss.item() == pytest.approx((1 + 2 + 3) / 3, rel=1e-15)
    assert baselines.likelihood_loss(logprobs, mask, 0 * keep).item() == 0


def test_gae_by_hand():
    # One program of two tokens and one of three, rewards at the end and a KL price in between.
    rewards = torch.tensor([[0.1, -1.0, 7.0], [0.0, 0.2, 0.5]], dtype=D)
    values = torch.tensor([[0.4, -0.3, 9.0], [0.1, 0.6, -0.2]], dtype=D)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=D)
    advantages, returns = baselines.gae(rewards, values, mask, 0.5)
    first = -1.0 + 0.3
    second = (0.1 - 0.3 - 0.4) + 0.5 * first
    third = 0.5 + 0.2
    fourth = (0.2 - 0.2 - 0.6) + 0.5 * third
    fifth = (0.0 + 0.6 - 0.1) + 0.5 * fourth
    expected = torch.tensor([[second, first, 0], [fifth, fourth, third]], dtype=D)
    torch.testing.assert_close(advantages, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(returns, (expected + values) * mask, rtol=1e-14, atol=1e-15)


def test_gae_with_lambda_one_is_what_is_still_to_come():
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 5, dtype=D), torch.randn(3, 5, dtype=D)
    advantages, returns = baselines.gae(rewards, values, torch.ones(3, 5, dtype=D), 1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_come, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(advantages, to_come - values, rtol=1e-13, atol=1e-13)


def test_kl_is_paid_at_every_token_and_the_reward_comes_at_the_last():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=D)
    old = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]], dtype=D)
    ref = torch.tensor([[-2.0, -2.5, 0.0], [-1.0, -3.0, -0.5]], dtype=D)
    found = baselines.kl_rewards(old, ref, torch.tensor([-1.0, 0.0], dtype=D), mask, 0.1)
    expected = [[-0.1, -0.05 - 1.0, 0.0], [0.0, -0.2, 0.05]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=D), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: ratio A; d/dlogp of it is the same number
        (1.5, 2.0, -2.4, 0.0),  # a gain beyond 1.2 is not paid for
        (1.5, -2.0, 3.0, 3.0),  # but a loss is
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_clipped_loss_and_its_slope(ratio, advantage, loss, slope):
    logprobs = row(math.log(ratio) - 3, 0.0).requires_grad_()
    found = baselines.clipped_loss(
        logprobs, row(-3.0, 0.0), row(advantage, 5.0), row(1.0, 0.0), clip=0.2
    )
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([slope, 0.0], rel=1e-12)


def test_whitened_has_mean_zero_and_variance_one_over_tokens():
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=D)
    found = baselines.whitened(torch.tensor([[1.0, 2.0], [6.0, 50.0]], dtype=D), mask)
    assert found.tolist()[1][1] == 0
    assert found.sum().item() == pytest.approx(0, abs=1e-12)
    assert found.square().sum().item() / 3 == pytest.approx(1, rel=1e-5)


def test_value_loss_by_hand():
    loss = baselines.value_loss(row(1.0, 2.0, 9.0), row(0.0, 4.0, 0.0), row(1.0, 1.0, 0.0))
    assert loss.item() == pytest.approx(0.5 * (1 + 4) / 2, rel=1e-15)


def test_group_advantages_are_normalised_in_the_group_and_leave_rows_out():
    rewards = torch.tensor([0.0, -1.0, -1.0, 0.0, -1.0, -1.0, 0.0], dtype=D)
    groups = torch.tensor([4, 4, 4, 4, 9, 9, 4])
    keep = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=D)
    found = baselines.group_advantages(rewards, groups, keep)
    # Rewards 0, -1, -1, 0: mean -1/2, deviation sqrt(1/3). The last row is not one of them.
    one = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert found.tolist() == pytest.approx([one, -one, -one, one, 0.0, 0.0, 0.0], rel=1e-14)


def test_kl_estimate_by_hand():
    new, old, ref = row(-1.0, -2.0), row(-1.2, -2.0), row(-1.5, -2.0)
    found = baselines.kl_estimate(new, old, ref, row(1.0, 1.0))
    expected = math.exp(0.2) * (math.exp(-0.5) + 0.5 - 1) / 2
    assert found.item() == pytest.approx(expected, rel=1e-14)


def test_expected_slope_of_the_kl_estimate_is_that_of_the_divergence():
    """Over all five tokens, each as often as a policy samples it that is not the present one."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=D, requires_grad=True)
    new = logits.log_softmax(0)
    old, ref = (torch.randn(5, dtype=D).log_softmax(0) for _ in range(2))
    estimates = [
        baselines.kl_estimate(*(part[a].view(1, 1) for part in (new, old, ref)), row(1.0))
        for a in range(5)
    ]
    expected = sum(chance * found for chance, found in zip(old.exp(), estimates, strict=True))
    divergence = (new.exp() * (new - ref)).sum()
    slopes = [
        torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (expected, divergence)
    ]
    torch.testing.assert_close(expected, divergence, rtol=1e-13, atol=0)
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)
