"""logprobs_from_logits against PyTorch on logits that already exist, and against a copy."""

from collections.abc import Callable

import pytest
import torch
from bandwidth import BandwidthCase, Implementation, Results, run_case
from measure import DEVICE
from shapes import LOGITS, LogitsShape, chosen
from torch import Tensor

import spo_ext


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None]).squeeze(-1)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spo_ext": spo_ext.logprobs_from_logits,
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
}


def forward(name: str) -> Implementation:
    def run(inputs: Results) -> Results:
        with torch.no_grad():
            return (FUNCTIONS[name](*inputs[:2]),)

    return run


def total(name: str) -> Implementation:
    def run(inputs: Results) -> Results:
        logits, targets, upstream = inputs
        return torch.autograd.grad(FUNCTIONS[name](logits, targets), logits, upstream)

    return run


def case_of(shape: LogitsShape, backward: bool) -> BandwidthCase:
    def make_inputs() -> Results:
        size = (shape.tokens, shape.vocabulary)
        logits = torch.randn(size, device=DEVICE, dtype=shape.dtype)
        targets = torch.randint(shape.vocabulary, (shape.tokens,), device=DEVICE)
        return logits.requires_grad_(), targets, torch.randn(shape.tokens, device=DEVICE)

    return BandwidthCase(
        op="logprobs_from_logits",
        shape=shape.name,
        tokens=shape.tokens,
        direction="forward+backward" if backward else "forward",
        # one read; backward another read and a write
        num_bytes=(3 if backward else 1) * shape.tokens * shape.vocabulary * shape.dtype.itemsize,
        tolerance=1e-2,
        make_inputs=make_inputs,
        implementations={n: (total if backward else forward)(n) for n in FUNCTIONS},
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", chosen(LOGITS[DEVICE]), ids=lambda s: s.name)
def test_logprobs_from_logits(benchmark, shape: LogitsShape, name: str, backward: bool) -> None:
    run_case(benchmark, case_of(shape, backward), name)
