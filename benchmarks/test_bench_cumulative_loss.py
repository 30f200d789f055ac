"""The SPO loss from log-probabilities against the same formula in PyTorch, and against a copy."""

import pytest
import torch
from bandwidth import BandwidthCase, Implementation, Results, run_case
from measure import DEVICE
from shapes import TOKENS, TokenShape, chosen
from torch import Tensor

import spo_ext

BETA = 0.1


def eager(logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, q0: Tensor) -> Tensor:
    terminal_q = q0 + BETA * (logprobs - ref_logprobs).sum(1)
    return (terminal_q - rewards).square().mean()


FUNCTIONS = {
    "spo_ext": lambda lp, ref, rewards, q0: spo_ext.loss(
        lp, ref, rewards, q0, beta=BETA, objective="squared"
    ),
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
}


def forward(name: str) -> Implementation:
    def run(inputs: Results) -> Results:
        with torch.no_grad():
            return (FUNCTIONS[name](*inputs),)

    return run


def total(name: str) -> Implementation:
    return lambda inputs: torch.autograd.grad(FUNCTIONS[name](*inputs), inputs[0])


def case_of(shape: TokenShape, backward: bool) -> BandwidthCase:
    def make_inputs() -> Results:
        size = (shape.sequences, shape.length)
        logprobs, ref = (-torch.rand(size, device=DEVICE) for _ in range(2))
        rewards, q0 = (-torch.rand(shape.sequences, device=DEVICE) for _ in range(2))
        return logprobs.requires_grad_(), ref, rewards, q0

    return BandwidthCase(
        op="cumulative_loss",
        shape=shape.name,
        tokens=shape.tokens,
        direction="forward+backward" if backward else "forward",
        # two reads of 4 bytes; the gradient of a terminal loss is one number per completion, so
        # backward has only to write it
        num_bytes=(12 if backward else 8) * shape.tokens,
        tolerance=1e-3,
        make_inputs=make_inputs,
        implementations={n: (total if backward else forward)(n) for n in FUNCTIONS},
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", chosen(TOKENS[DEVICE]), ids=lambda s: s.name)
def test_cumulative_loss(benchmark, shape: TokenShape, name: str, backward: bool) -> None:
    run_case(benchmark, case_of(shape, backward), name)
