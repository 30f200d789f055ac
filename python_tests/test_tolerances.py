"""The error model of tensor cores against a simulation of them."""

import pytest
import torch
from conftest import head_inputs
from tolerances import LOGPROB_TOLERANCE, gpu_logprob_tolerance, logprob_error
from torch import Tensor


def cut(x: Tensor) -> Tensor:
    """Round to float32 toward zero."""
    near = x.float()
    past = near.double().abs() > x.abs()
    return torch.where(past, near.nextafter(torch.zeros_like(near)), near).double()


def by_tensor_cores(hidden: Tensor, weight: Tensor) -> Tensor:
    """Multiply as a tensor core does: 16 exact products at a time, then cut off."""
    logits = torch.zeros(len(hidden), len(weight), dtype=torch.float64)
    for h, w in zip(hidden.split(16, 1), weight.split(16, 1), strict=True):
        logits = cut(logits + h @ w.T)
    return logits


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("depth", [64, 1024, 4096])
def test_tensor_cores_stay_within_the_tolerance(depth, confident):
    """And use a good part of it, so that it does not hide other errors."""
    hidden, weight, targets = head_inputs(16, 3000, depth, torch.bfloat16)
    hidden, weight = hidden.detach().double(), weight.detach().double()
    if confident:  # three likely tokens
        likely = torch.stack([targets, *torch.randint(3000, (2, 16))])
        strength = torch.tensor([4.0, 3.75, 3.5])[:, None, None]
        hidden = (weight[likely] * strength).sum(0).bfloat16().double()
    logits = hidden @ weight.T
    got, want = (
        z.log_softmax(-1).gather(-1, targets[:, None])
        for z in (by_tensor_cores(hidden, weight), logits)
    )
    label = logits.gather(-1, targets[:, None]).abs() / want.abs().clamp(min=1)
    dtype, largest = torch.bfloat16, float(label.max())
    room = gpu_logprob_tolerance(dtype, depth, max(1.0, largest)) - LOGPROB_TOLERANCE[dtype]
    assert room / 20 < logprob_error(got, want) < room
