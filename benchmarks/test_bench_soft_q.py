"""soft_q over padded completions against the same formula in PyTorch, and against a copy."""

import pytest
import torch
from bandwidth import BandwidthCase, Implementation, Results, run_case
from measure import DEVICE
from shapes import TOKENS, TokenShape, chosen
from torch import Tensor

import spo_ext

BETA = 0.1


def eager(logprobs: Tensor, ref_logprobs: Tensor, q0: Tensor) -> Tensor:
    return q0[:, None] + BETA * (logprobs - ref_logprobs).cumsum(1)


FUNCTIONS = {
    "spo_ext": lambda lp, ref, q0: spo_ext.soft_q(lp, ref, q0, beta=BETA),
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
}


def forward(name: str) -> Implementation:
    def run(inputs: Results) -> Results:
        with torch.no_grad():
            return (FUNCTIONS[name](*inputs[:3]),)

    return run


def total(name: str) -> Implementation:
    def run(inputs: Results) -> Results:
        logprobs, ref, q0, upstream = inputs
        return torch.autograd.grad(FUNCTIONS[name](logprobs, ref, q0), logprobs, upstream)

    return run


def case_of(shape: TokenShape, backward: bool) -> BandwidthCase:
    def make_inputs() -> Results:
        size = (shape.sequences, shape.length)
        logprobs, ref = (-torch.rand(size, device=DEVICE) for _ in range(2))
        q0 = -torch.rand(shape.sequences, device=DEVICE)
        return logprobs.requires_grad_(), ref, q0, torch.randn(size, device=DEVICE)

    return BandwidthCase(
        op="soft_q",
        shape=shape.name,
        tokens=shape.tokens,
        direction="forward+backward" if backward else "forward",
        # two reads and a write of 4 bytes; backward one more read and write
        num_bytes=(20 if backward else 12) * shape.tokens,
        tolerance=1e-3,
        make_inputs=make_inputs,
        implementations={n: (total if backward else forward)(n) for n in FUNCTIONS},
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", chosen(TOKENS[DEVICE]), ids=lambda s: s.name)
def test_soft_q(benchmark, shape: TokenShape, name: str, backward: bool) -> None:
    run_case(benchmark, case_of(shape, backward), name)
