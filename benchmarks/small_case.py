"""Every CUDA op once, forward and backward, at sizes small enough for a sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/small_case.py

Sizes leave a rest everywhere: rows of a tile, entries of a block, channels of a 16-byte word.
"""

import sys
from typing import Any

import torch
from torch import Tensor

import spo_ext

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def finish(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    total = torch.stack([out.double().sum() for out in outputs]).sum()
    grads = torch.autograd.grad(total, inputs)
    assert all(bool(t.isfinite().all()) for t in (*outputs, *grads))


def head(dtype: torch.dtype, tokens: int, vocabulary: int, depth: int, **options: Any) -> None:
    hidden = torch.randn(tokens, depth, device="cuda").to(dtype)
    weight = torch.randn(vocabulary, depth, device="cuda").to(dtype) / depth**0.5
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    targets[:: max(2, tokens // 3)] = -100
    bias = torch.randn(vocabulary, device="cuda").to(dtype)
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    logprobs, entropy = spo_ext.token_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        return_entropy=True,
        **{"strategy": "recompute", **options},
    )
    finish((logprobs, entropy), inputs)


def frozen_head(dtype: torch.dtype, tokens: int, vocabulary: int, depth: int) -> None:
    hidden = torch.randn(tokens, depth, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, depth, device="cuda").to(dtype) / depth**0.5
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    targets[::5] = -100
    out = spo_ext.token_logprobs(hidden, weight, targets, softcap=5.0, strategy="frozen")
    finish((out,), (hidden,))


def sharp_head(dtype: torch.dtype, tokens: int, vocabulary: int, depth: int) -> None:
    """Tokens near the entries they name, so that most blocks are dropped."""
    weight = (torch.randn(vocabulary, depth, device="cuda") / depth**0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    hidden = weight[targets] * 24
    targets[::5] = -100
    out, dropped = spo_ext.token_logprobs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        max_dropped_mass=2.0**-8,
        return_dropped_mass=True,
    )
    assert bool((dropped > 0).any())
    finish((out,), (hidden, weight))


def logits(dtype: torch.dtype, vocabulary: int) -> None:
    leaf = torch.randn(9, vocabulary, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (9,), device="cuda")
    for inplace in (False, True):
        out = spo_ext.logprobs_from_logits(
            leaf * 1, targets, return_entropy=True, inplace_backward=inplace
        )
        finish(out, (leaf,))


def losses(dtype: torch.dtype) -> None:
    """Packed sequences: longer than a block, one token, none."""
    lengths = torch.tensor([0, 1500, 1501, 1501, 1700], device="cuda")
    logprobs = (-torch.rand(1700, device="cuda")).to(dtype).requires_grad_()
    ref = (-torch.rand(1700, device="cuda")).to(dtype)
    rewards, q0 = -torch.rand(4, device="cuda"), -torch.rand(4, device="cuda")
    where: dict[str, Any] = {"beta": 0.1, "cu_seqlens": lengths}
    groups = torch.tensor([0, 0, 1, 1], device="cuda")
    mask = torch.rand(1700, device="cuda") < 0.8
    out = [
        spo_ext.soft_q(logprobs, ref, q0, **where, mask=mask),
        spo_ext.loss(logprobs, ref, rewards, q0, **where, mask=mask),
        spo_ext.loss(logprobs, ref, rewards, q0, **where, objective="advantage"),
        spo_ext.loss(logprobs, ref, rewards, None, **where, objective="group", groups=groups),
        spo_ext.loss(logprobs, ref, None, q0, **where, objective="squared", q_targets=ref.float()),
    ]
    finish(tuple(out), (logprobs,))


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("small_case.py needs a CUDA GPU")
    torch.manual_seed(0)
    for dtype in DTYPES:
        head(dtype, 70, 515, 72)
        head(dtype, 131, 300, 129, temperature=0.7, softcap=5.0)  # rows that are not aligned
        head(dtype, 1, 1, 1)
        logits(dtype, 1003)
        losses(dtype)
        head(dtype, 70, 515, 72, strategy="stored")
        frozen_head(dtype, 131, 900, 72)
        sharp_head(dtype, 131, 2050, 72)
    head(torch.bfloat16, 300, 1030, 64, workspace_mib=4)
    torch.cuda.synchronize()
    print("small_case: every op ran, every number finite")


if __name__ == "__main__":
    main()
