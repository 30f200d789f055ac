"""linear_loss: from hidden states to the SPO loss, against the reference chained end to end."""

import pytest
import torch
from conftest import doubled, eager, head_inputs, relative_error

import spo_ext

pytestmark = pytest.mark.usefixtures("device")


def case(dtype=torch.float32):
    hidden, weight, _ = head_inputs(24, 700, 32, dtype)
    hidden = hidden.detach().view(4, 6, 32).requires_grad_()
    targets = torch.randint(700, (4, 6))
    targets[1, 3:] = -100
    targets[3] = -100
    return hidden, weight, targets, torch.randn(4, 6) - 5, -torch.rand(4), -torch.rand(4)


@pytest.mark.parametrize("objective", ["squared", "cross_entropy", "advantage"])
def test_matches_reference_end_to_end(objective):
    hidden, weight, targets, ref, rewards, q0 = case()
    mask = torch.rand(4, 6) < 0.8
    got = spo_ext.linear_loss(
        hidden,
        weight,
        targets,
        ref,
        rewards,
        q0,
        beta=0.2,
        objective=objective,
        temperature=0.8,
        mask=mask,
    )
    truth = [doubled(hidden), doubled(weight)]
    counted = mask & (targets != -100)
    logprobs, _ = eager.token_logprobs(*truth, targets, temperature=0.8)
    losses = eager.loss(
        logprobs,
        ref.double(),
        rewards.double(),
        q0.double(),
        beta=0.2,
        objective=objective,
        mask=counted,
    )
    want = losses.sum() / counted.any(1).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    grads = torch.autograd.grad(got, (hidden, weight))
    for a, b in zip(grads, torch.autograd.grad(want, truth), strict=True):
        assert relative_error(a, b) <= 2e-5


def test_packed_equals_padded():
    hidden, weight, targets, ref, rewards, q0 = case()
    counted = targets != -100
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counted.sum(1).cumsum(0)])
    padded = spo_ext.linear_loss(hidden, weight, targets, ref, rewards, q0, beta=0.2)
    packed = spo_ext.linear_loss(
        hidden[counted],
        weight,
        targets[counted],
        ref[counted],
        rewards,
        q0,
        beta=0.2,
        cu_seqlens=offsets,
    )
    assert torch.equal(packed, padded)
    grads = [torch.autograd.grad(total, (hidden, weight)) for total in (packed, padded)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_stats_and_loss_arguments_pass_through():
    hidden, weight, targets, ref, rewards, _ = case()
    total, stats = spo_ext.linear_loss(
        hidden,
        weight,
        targets,
        ref,
        rewards,
        None,
        beta=0.2,
        objective="group",
        groups=torch.tensor([0, 0, 1, 1]),
        weights=torch.full((4,), 0.5),
        reduction="sum",
        denominator=8,
        return_stats=True,
    )
    assert stats.num_tokens.tolist() == [6, 3, 6, 0]
    assert total.item() == pytest.approx(stats.loss.sum().item() / 8, rel=1e-6)


def test_solved_sequences_cost_no_head_work():
    """A clipped sequence sends back zeros, whose rows the head's backward skips: a NaN there does
    no harm."""
    hidden, weight, targets, ref, _, _ = case()
    rewards = torch.tensor([0.0, -0.5, -0.5, -0.5])
    q0 = torch.tensor([1e6, -1.0, -1.0, -1.0])  # sequence 0: y = 1 and Q_T > 0
    total = spo_ext.linear_loss(hidden, weight, targets, ref, rewards, q0, beta=1.0)
    grad = torch.autograd.grad(total, hidden)[0]
    assert (grad[0] == 0).all() and (grad[1, :3] != 0).any() and (grad[1, 3:] == 0).all()


def test_refuses():
    hidden, weight, targets, ref, rewards, q0 = case()
    with pytest.raises(ValueError, match="linear_loss: mask must be bool of shape"):
        spo_ext.linear_loss(
            hidden, weight, targets, ref, rewards, q0, beta=1.0, mask=torch.ones(4, 6)
        )
    with pytest.raises(TypeError, match="unexpected keyword"):
        spo_ext.linear_loss(hidden, weight, targets, ref, rewards, q0, beta=1.0, betta=2.0)
