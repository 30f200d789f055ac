"""token_logprobs against what a PyTorch user has today, on the same states.

Every round times the implementation, spo_ext and the bare matrix product of the same shape in turn;
ratios of medians are the result. Before anything is timed, the log-probabilities must agree.
"""

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from measure import DEVICE, ON_GPU, extra_mib, take_turns
from peers import PEERS, Logprobs, warn_if_no_gradient_per_token
from shapes import HEADS, HeadShape, chosen
from torch import Tensor
from truth import HeadInputs

import spo_ext

SHAPES: list[HeadShape] = chosen(HEADS[DEVICE])


def pairs() -> list[Any]:
    """spo_ext and eager at every shape come first: a peer may take minutes to compile, or crash the
    GPU's context, and then only the peers after it are lost. SPO_BENCH_PEERS=name,name picks."""
    usable = {n: p for n, p in PEERS.items() if not (p.cpu_only if ON_GPU else p.gpu_only)}
    asked = os.environ.get("SPO_BENCH_PEERS", "")
    usable = {n: p for n, p in usable.items() if not asked or n in asked.split(",")}
    ours = [(s, n) for s in SHAPES for n in usable if n.startswith("spo_ext") or n == "eager"]
    peers = [(s, n) for s in SHAPES for n, p in usable.items() if s.every_peer or p.every_shape]
    ordered = [*ours, *(pair for pair in peers if pair not in ours)]
    return [pytest.param(s, n, id=f"{s.name}-{n}") for s, n in ordered]


# Largest |difference| of a log-probability before something is called wrong: logits in 16 bits.
AGREEMENT = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


@lru_cache(maxsize=1)  # one shape's inputs at a time: they are large
def inputs_of(shape: HeadShape) -> HeadInputs:
    if ON_GPU:
        torch.cuda.empty_cache()
    return HeadInputs.make(shape, DEVICE)


@pytest.fixture(scope="module", autouse=True)
def _free_inputs() -> Iterator[None]:
    yield
    inputs_of.cache_clear()


def loaded(name: str, inputs: HeadInputs, backward: bool) -> Logprobs:
    """The peer, tried once. One that cannot run here is skipped with its own words; spo_ext never
    is."""
    try:
        function = PEERS[name].load()
        with torch.no_grad():
            function(*inputs.leaves)
        if backward:
            total_call(name, function, inputs, None)()
        return function
    except Exception as error:
        if name.startswith("spo_ext"):
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        pytest.skip(f"{name}: {type(error).__name__}: {reason}")


def check_agreement(name: str, function: Logprobs, inputs: HeadInputs) -> Tensor:
    with torch.no_grad():
        logprobs = function(*inputs.leaves).detach()
    want = inputs.truth.logprobs[: inputs.tokens]
    if PEERS[name].per_token:
        assert (logprobs - want).abs().max() <= AGREEMENT[inputs.shape.dtype]
    else:
        warn_if_no_gradient_per_token(name)
        torch.testing.assert_close(logprobs.double(), want.sum(), rtol=1e-2, atol=0)
    return logprobs


def forward_call(function: Logprobs, inputs: HeadInputs) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*inputs.leaves),)

    return call


def total_call(
    name: str, function: Logprobs, inputs: HeadInputs, upstream: Tensor | None
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; without `upstream` of the sum."""
    hidden, weight, targets = inputs.leaves
    wanted = (hidden, weight) if PEERS[name].trains_head else (hidden,)
    weight = weight if PEERS[name].trains_head else weight.detach()

    def call() -> tuple[Tensor, ...]:
        logprobs = function(hidden, weight, targets)
        return torch.autograd.grad(
            logprobs.sum() if upstream is None else logprobs, wanted, upstream
        )

    return call


def gemm_call(inputs: HeadInputs) -> Callable[[], object]:
    hidden, weight, _ = (t.detach() for t in inputs.leaves)
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    return lambda: torch.mm(hidden, weight.T, out=logits)


def scored(function: Logprobs, inputs: HeadInputs) -> Tensor:
    """Every token that the noise is measured on, in batches of the timed size."""
    batches = zip(
        inputs.hidden.split(inputs.tokens), inputs.targets.split(inputs.tokens), strict=True
    )
    with torch.no_grad():
        return torch.cat([function(h, inputs.weight.detach(), t) for h, t in batches])


def errors(name: str, function: Logprobs, inputs: HeadInputs, backward: bool) -> dict[str, object]:
    truth, per_token = inputs.truth, PEERS[name].per_token
    if backward:
        upstream = inputs.upstream if per_token else torch.ones_like(inputs.upstream)
        given = upstream if per_token else upstream[0]
        return dict(truth.grad_errors(total_call(name, function, inputs, given)(), upstream))
    if not per_token:
        return {}
    logprobs = scored(function, inputs)
    return {**truth.logprob_errors(logprobs), "noise_of_sum": truth.noise(logprobs)}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape, name", pairs())
def test_head(benchmark, shape: HeadShape, name: str, backward: bool) -> None:
    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"token_logprobs {shape.name} {direction}"
    inputs = inputs_of(shape)
    function = loaded(name, inputs, backward)
    check_agreement(name, function, inputs)

    def timed(name: str, function: Logprobs) -> Callable[[], tuple[Tensor, ...]]:
        if not backward:
            return forward_call(function, inputs)
        upstream = inputs.upstream if PEERS[name].per_token else inputs.upstream[-1]
        return total_call(name, function, inputs, upstream)

    call = timed(name, function)
    benchmark.extra_info.update(
        op="token_logprobs",
        implementation=name,
        direction=direction,
        shape=shape.name,
        tokens=inputs.tokens,
        vocabulary=len(inputs.weight),
        depth=inputs.weight.shape[1],
        dtype=str(shape.dtype).removeprefix("torch."),
        states=inputs.source,
        per_token=PEERS[name].per_token,
        note=PEERS[name].note,
        **errors(name, function, inputs, backward),
    )
    call()
    benchmark.extra_info["extra_mib"] = extra_mib(call)
    others: dict[str, Callable[[], object]] = {"gemm": gemm_call(inputs)}
    if name != "spo_ext":
        others["spo_ext"] = timed("spo_ext", spo_ext.token_logprobs)
    times = take_turns(benchmark, call, others)
    times.setdefault("spo_ext", times["this"])
    benchmark.extra_info.update(
        ms=times["this"],
        spo_ext_ms=times["spo_ext"],
        gemm_ms=times["gemm"],
        over_gemm=times["this"] / times["gemm"],
        peer_over_spo_ext=times["this"] / times["spo_ext"],
    )
