"""Shared fixtures: the devices under test, one tolerance table, seeded inputs."""

from collections.abc import Iterator

import pytest
import torch
from sandbox_cases import FAST, WHY_NOT
from torch import Tensor

from spo_ext.sandbox import Sandbox

DEVICES = ["cpu"]

# Largest relative error against the reference in float64 on the same (rounded) inputs.
# Log-probabilities come out in
# float32 whatever the input, so only gradients are coarser for 16-bit types: they are rounded once
# to that type.
LOGPROB_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.bfloat16: 3e-6,
    torch.float16: 3e-6,
}
GRAD_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 4e-3,  # 2^-8: half a unit in the last place of bfloat16 is 2^-9
    torch.float16: 6e-4,  # 2^-11 likewise, and some subnormals
}
DTYPES = list(LOGPROB_TOLERANCE)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if WHY_NOT["bwrap"] is not None:
        pytest.skip(f"bubblewrap does not work here: {WHY_NOT['bwrap']}")
    with Sandbox(workers=2, level="bwrap", limits=FAST) as sandbox:
        yield sandbox


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of the truth; the difference itself where the truth is
    0."""
    difference = (got.detach().double() - want.detach().double()).norm()
    scale = want.detach().double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def logprob_error(got: Tensor, want: Tensor) -> float:
    """max |error| / max(1, |log-probability|)."""
    if got.numel() == 0:
        return 0.0
    want = want.detach().double()
    return float(((got.detach().double() - want).abs() / want.abs().clamp(min=1)).max())


def doubled(tensor: Tensor) -> Tensor:
    """The same (rounded) numbers as a float64 leaf."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def head_inputs(
    tokens: int, vocabulary: int, depth: int, dtype: torch.dtype, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, d], weight [V, d] (leaves) and targets [N]; logits have standard deviation
    `scale`."""
    hidden = torch.randn(tokens, depth).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, depth) * scale / depth**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,))
