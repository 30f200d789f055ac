"""What the tests of the CUDA kernels share. Import only in modules marked `cuda`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import spo_ext

Outputs = tuple[Tensor, ...]  # logprobs, entropy, grad_hidden, grad_weight
Inputs = tuple[Tensor, Tensor, Tensor]  # hidden [N, d], weight [V, d], targets [N]


def run_head(hidden: Tensor, weight: Tensor, targets: Tensor, **options: object) -> Outputs:
    """Forward and backward with another upstream gradient for every token, the same for a token
    wherever it is: it depends on the token's own results. By the strategy of large shapes."""
    options = {"strategy": "recompute", **options}
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprobs, entropy = spo_ext.token_logprobs(
        hidden, weight, targets, return_entropy=True, **options
    )
    total = (logprobs.cos() + entropy.sin()).sum()
    return (logprobs.detach(), entropy.detach(), *torch.autograd.grad(total, (hidden, weight)))


def assert_same_bits(got: Outputs, want: Outputs) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.view(b.shape), b)


def float64_on_gpu(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, grad_hidden and grad_weight in float64, a few rows at a time.

    On the GPU, since the CPU would take minutes at real vocabularies; written out, so that it
    shares nothing with the kernels, not even autograd.
    """
    wide = weight.detach().double()
    grad_weight = torch.zeros_like(wide)
    logprobs, grad_hidden = [], []
    for rows in torch.arange(len(hidden), device=hidden.device).split(512):
        state, label = hidden.detach()[rows].double(), targets[rows].long()[:, None]
        scores = (state @ wide.T).log_softmax(-1)
        logprobs.append(scores.gather(-1, label)[:, 0])
        factor = upstream[rows].double()[:, None]
        grad_scores = -factor * scores.exp()
        grad_scores.scatter_add_(1, label, factor)
        grad_hidden.append(grad_scores @ wide)
        grad_weight += grad_scores.T @ state
    return torch.cat(logprobs), torch.cat(grad_hidden), grad_weight


def peak_mib(function: Callable[[], object]) -> float:
    """What the call allocates at its peak beyond what is alive before it, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def mib(*tensors: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def moved_case(
    case: tuple[Tensor, Tensor, dict[str, Any]], device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A case of loss_cases on another device, floating-point numbers rounded to `dtype`."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device, dtype if value.is_floating_point() else None)

    logprobs, ref_logprobs, arguments = case
    rest = {name: move(value) for name, value in arguments.items()}
    return move(logprobs).requires_grad_(), move(ref_logprobs), rest
