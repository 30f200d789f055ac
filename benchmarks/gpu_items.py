"""One thing to be known of a GPU, in a process of its own: benchmarks/gpu.sh starts these.

    python benchmarks/gpu_items.py hopper/statistics/small

Each finding is printed as a line of JSON as soon as it is there, so that a later hang or fault
loses nothing. The exit status is 1 if a result is wrong. On a machine without a GPU,
SPO_BENCH_DEVICE=cpu computes and compares the same at sizes that a CPU manages.
"""

import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "python_tests"))

import machine
from cuda_cases import float64_on_gpu
from loss_cases import FORMS, packed_case
from measure import DEVICE, ON_GPU, ROUNDS, Stopwatch, extra_mib, roof, synchronize
from shapes import BF16, FP16, FP32, HEADS, HeadShape
from states import synthetic_states
from test_bench_token_logprobs import forward_call, gemm_call, total_call
from tolerances import (
    GRAD_TOLERANCE,
    gpu_logprob_tolerance,
    logprob_error,
    relative_error,
)
from truth import HeadInputs

import spo_ext

# (N, V, d): one with a rest everywhere, one that fills the chip
SHAPES = {
    "small": (300, 1030, 64),
    "large": (8192, 4096, 4096) if ON_GPU else (520, 1100, 256),
}
# What each kernel's result shows in. The gradient kernel's dz is summed over tokens in grad_bias.
KERNELS = {"statistics": "", "gradient": "bias", "hidden-grad": "hidden", "weight-grad": "weight"}
HEADLINE: HeadShape = replace(HEADS["cuda"][0] if ON_GPU else HEADS["cpu"][-1], noise_tokens=0)
wrong: list[str] = []


def found(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def check(name: str, error: float, limit: float) -> None:
    """Report an error and its limit; NaN, which JSON does not have, is above every limit."""
    if not error <= limit:
        wrong.append(name)
    found(check=name, error=error if math.isfinite(error) else None, limit=limit)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated with NaN, so that an element which no kernel writes shows."""
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public one loads Inductor
    yield
    torch._C._set_deterministic_algorithms(False)


def head(dtype: torch.dtype, tokens: int, vocabulary: int, depth: int) -> tuple[Tensor, ...]:
    """Return hidden, weight, a bias of zeros, targets and an upstream gradient, for logits of
    standard deviation 2."""
    hidden = torch.randn(tokens, depth, device=DEVICE).to(dtype)
    weight = (torch.randn(vocabulary, depth, device=DEVICE) * 2 / depth**0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
    bias = torch.zeros(vocabulary, device=DEVICE, dtype=dtype)
    return hidden, weight, bias, targets, torch.randn(tokens, device=DEVICE)


def head_truth(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    """Return log-probabilities and gradients in float64. A column of ones beside hidden makes the
    gradient of the bias that of a weight."""
    ones, zeros = hidden.new_ones(len(hidden), 1), weight.new_zeros(len(weight), 1)
    wide = torch.cat([hidden, ones], 1), torch.cat([weight, zeros], 1)
    logprobs, grad_hidden, grad_weight = float64_on_gpu(*wide, targets, upstream)
    depth = hidden.shape[1]
    return {
        "logprob": logprobs,
        "grad_hidden": grad_hidden[:, :depth],
        "grad_weight": grad_weight[:, :depth],
        "grad_bias": grad_weight[:, depth],
    }


def head_check(
    dtype: torch.dtype, size: str, wanted: tuple[str, ...], room: float = 0.0, **options: Any
) -> None:
    """Compare log-probabilities and the wanted gradients with float64; `room` is for gradients."""
    hidden, weight, bias, targets, upstream = head(dtype, *SHAPES[size])
    truth = head_truth(hidden, weight, targets, upstream)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    inputs = [leaves[name].requires_grad_() for name in wanted]
    given = bias if "bias" in wanted else None
    with poisoned():
        logprobs = spo_ext.token_logprobs(hidden, weight, targets, bias=given, **options)
    limit = gpu_logprob_tolerance(dtype, hidden.shape[1])
    check(f"{size} logprob", logprob_error(logprobs, truth["logprob"]), limit)
    if not inputs:
        return
    with poisoned():
        grads = torch.autograd.grad(logprobs, inputs, upstream)
    for name, grad in zip(wanted, grads, strict=True):
        error = relative_error(grad, truth[f"grad_{name}"])
        check(f"{size} grad_{name}", error, GRAD_TOLERANCE[dtype] + room)


def kernel_check(kernel: str, size: str) -> None:
    wanted = tuple(filter(None, [KERNELS[kernel]]))
    head_check(BF16, size, wanted, strategy="recompute")


def every_gradient(dtype: torch.dtype) -> None:
    for size in SHAPES:
        head_check(dtype, size, ("hidden", "weight", "bias"), strategy="recompute")


def frozen() -> None:
    for size in SHAPES:
        head_check(BF16, size, ("hidden",), strategy="frozen")


def sparse(eps: float = 2.0**-10) -> None:
    """Check the certificate, on states with three likely entries each: blocks are dropped."""
    for size, (tokens, vocabulary, depth) in SHAPES.items():
        states = synthetic_states(tokens, vocabulary, depth, DEVICE, BF16)
        hidden, weight, targets = states.hidden, states.weight.to(BF16), states.targets
        upstream = torch.randn(tokens, device=DEVICE)
        truth = head_truth(hidden, weight, targets, upstream)
        inputs = hidden.requires_grad_(), weight.requires_grad_()
        with poisoned():
            logprobs, dropped = spo_ext.token_logprobs(
                *inputs, targets, max_dropped_mass=eps, strategy="sparse", return_dropped_mass=True
            )
        limit = gpu_logprob_tolerance(BF16, depth, logits=20)
        check(f"{size} logprob", logprob_error(logprobs, truth["logprob"]), limit)
        check(f"{size} dropped mass", float(dropped.max()), eps)
        with poisoned():
            grads = torch.autograd.grad(logprobs, inputs, upstream)
        lengths = [float(t.detach().double().norm(dim=1).max()) for t in (weight, hidden)]
        for name, grad, reach in zip(("hidden", "weight"), grads, (2 * lengths[0], lengths[1])):  # noqa: B905
            want = truth[f"grad_{name}"]
            lost = float((upstream.double().abs() * dropped).norm()) * reach / float(want.norm())
            check(f"{size} grad_{name}", relative_error(grad, want), GRAD_TOLERANCE[BF16] + lost)


def logits() -> None:
    """Check `logprobs_from_logits`, also in place, at rows that are no multiple of a vector."""
    for dtype, (tokens, vocabulary) in ((BF16, (512, 50257)), (FP32, (64, 1003))):
        made = (torch.randn(tokens, vocabulary, device=DEVICE) * 3).to(dtype)
        targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
        upstream = torch.randn(tokens, device=DEVICE)
        scores = made.double().log_softmax(-1)
        want = scores.gather(-1, targets[:, None])[:, 0]
        true = -upstream.double()[:, None] * scores.exp()
        true.scatter_add_(1, targets[:, None], upstream.double()[:, None])
        for inplace in (False, True):
            leaf = made.clone().requires_grad_()
            with poisoned():
                got = spo_ext.logprobs_from_logits(leaf * 1, targets, inplace_backward=inplace)
                (grad,) = torch.autograd.grad(got, leaf, upstream)
            name = f"{str(dtype).removeprefix('torch.')}{' in place' * inplace}"
            check(f"{name} logprob", logprob_error(got, want), 3e-6)
            check(f"{name} grad", relative_error(grad, true), GRAD_TOLERANCE[dtype])


def loss() -> None:
    """Check every form of the loss, and `soft_q`, on sequences up to longer than a thread block."""
    for form in FORMS:
        leaf, ref, given = packed_case(form, [300, 1, 0, 45, 1025, 7])
        want = spo_ext.eager.loss(leaf, ref, **given)
        (true,) = torch.autograd.grad(want.sum(), leaf)

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().to(DEVICE, FP32 if value.is_floating_point() else None)

        here = moved(leaf).requires_grad_()
        arguments = {name: moved(value) for name, value in given.items()}
        with poisoned():
            got = spo_ext.loss(here, moved(ref), **arguments, reduction="none")
            (grad,) = torch.autograd.grad(got.sum(), here)
        check(form, relative_error(got, want), 1e-5)
        check(f"{form}, grad", relative_error(grad, true), 1e-5)
    sums = spo_ext.soft_q(
        here.detach(), moved(ref), 0.5, beta=0.1, cu_seqlens=arguments["cu_seqlens"]
    )
    steps = 0.1 * (leaf.detach() - ref)
    parts = [0.5 + part.cumsum(0) for part in steps.split(given["cu_seqlens"].diff().tolist())]
    check("soft_q", relative_error(sums, torch.cat(parts)), 1e-5)


def this_machine() -> None:
    found(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        device=DEVICE,
        processor=machine.processor(),
        packages=machine.versions(),
        build=spo_ext.build_info(),
    )
    if ON_GPU:
        found(gpu_properties=machine.gpu())


def gemm() -> None:
    """Measure the ceilings, and check the product they are measured with."""
    tokens, vocabulary, depth = SHAPES["large"]
    a, b, *_ = head(BF16, tokens, vocabulary, depth)
    error = relative_error(torch.mm(a, b.T), a.double() @ b.double().T)
    check("bf16 product", error, GRAD_TOLERANCE[BF16])
    found(**roof())


def kernel_times(call: Callable[[], object], runs: int = 2) -> list[dict[str, Any]]:
    """Return the milliseconds of one call in each of its kernels (operators, on a CPU)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as seen:
        for _ in range(runs):
            call()
        synchronize()
    rows = []
    for event in seen.key_averages():
        spent = event.self_device_time_total if ON_GPU else event.self_cpu_time_total
        name = re.sub(r"\bvoid |\(anonymous namespace\)::|\bspo::cuda::", "", event.key)[:160]
        rows.append({"kernel": name, "calls": event.count / runs, "ms": spent / runs / 1e3})
    return sorted(rows, key=lambda row: -row["ms"])[:16]


def headline(passes: str, **options: Any) -> None:
    """Check, then time against the bare product in turns, then memory, then time per kernel.
    `passes`: forward, exact, frozen or sparse; all but the first with the backward pass."""
    inputs = HeadInputs.make(HEADLINE, DEVICE)
    function = partial(spo_ext.token_logprobs, **options)
    found(shape=[inputs.tokens, *inputs.weight.shape], passes=passes, options=options)
    with torch.no_grad():
        logprobs = function(*inputs.leaves)
    truth = inputs.truth
    errors = truth.logprob_errors(logprobs)
    labels = (truth.logprobs + truth.lse).abs() / truth.logprobs.abs().clamp(min=1)
    limit = gpu_logprob_tolerance(BF16, HEADLINE.depth, float(labels.max()))
    check("logprob", errors["logprob_max"], limit)
    found(logprob_bias=errors["logprob_bias"])
    call = forward_call(function, inputs)
    if passes != "forward":
        name = "spo_ext-frozen" if passes == "frozen" else "spo_ext"  # which gradients it wants
        call = total_call(name, function, inputs, inputs.upstream)
        room = GRAD_TOLERANCE[BF16] if passes == "sparse" else 0.0  # 2^-10 loses less than that
        for grad, error in truth.grad_errors(call(), inputs.upstream).items():
            check(grad, error, GRAD_TOLERANCE[BF16] + room)
    stopwatch, product = Stopwatch(), gemm_call(inputs)
    for _ in range(3):
        product(), call()
    times = [(stopwatch(call), stopwatch(product)) for _ in range(ROUNDS)]
    ms, gemm_ms = map(statistics.median, zip(*times, strict=True))
    found(ms=ms, gemm_ms=gemm_ms, over_gemm=ms / gemm_ms)
    found(extra_mib=extra_mib(call))
    found(kernels=kernel_times(call))


ITEMS: dict[str, Callable[[], None]] = {"machine": this_machine, "gemm": gemm}
for _paths in ("hopper", "portable"):  # portable: with SPO_HOPPER=0
    for _kernel in KERNELS:
        for _size in SHAPES:
            ITEMS[f"{_paths}/{_kernel}/{_size}"] = partial(kernel_check, _kernel, _size)
ITEMS |= {
    "fp16": partial(every_gradient, FP16),
    "fp32": partial(every_gradient, FP32),
    "sparse": sparse,
    "frozen": frozen,
    "logits": logits,
    "loss": loss,
    "headline/forward": partial(headline, "forward"),
    "headline/exact-64": partial(headline, "exact", strategy="recompute", workspace_mib=64),
    "headline/exact-512": partial(headline, "exact", strategy="recompute", workspace_mib=512),
    "headline/frozen": partial(headline, "frozen", strategy="frozen"),
    "headline/sparse": partial(headline, "sparse", max_dropped_mass=2.0**-10),
    "headline/portable-forward": partial(headline, "forward"),
}


def main() -> None:
    if not ON_GPU and os.environ.get("SPO_BENCH_DEVICE") != "cpu":
        sys.exit("no GPU: torch sees none, or this build of spo_ext has no CUDA kernels")
    torch.manual_seed(20)
    ITEMS[sys.argv[1]]()
    synchronize()
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
