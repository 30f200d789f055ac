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


@pytest.mark.parametrize("scale", [2.0, 4.0])
@pytest.mark.parametrize("depth", [64, 1024, 4096])
def test_tensor_cores_stay_within_the_tolerance(depth, scale):
    """And use a good part of it, so that it does not hide other errors."""
    inputs = head_inputs(8, 4000, depth, torch.bfloat16, scale)
    hidden, weight = (t.detach().double() for t in inputs[:2])
    got, want = (
        logits.log_softmax(-1).gather(-1, inputs[2][:, None])
        for logits in (by_tensor_cores(hidden, weight), hidden @ weight.T)
    )
    room = gpu_logprob_tolerance(torch.bfloat16, depth) - LOGPROB_TOLERANCE[torch.bfloat16]
    assert room / 8 < logprob_error(got, want) < room
