"""An LM head whose vocabulary is split over processes, against the whole one."""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import GRAD_TOLERANCE, LOGPROB_TOLERANCE, head_inputs, logprob_error, relative_error
from torch import Tensor

import spo_ext

Shard = Callable[[Tensor], Tensor]
SHARDS = {2: (700, 303), 3: (1, 802, 200)}  # rows of each rank


def _child(check: Callable[..., None], rank: int, ranks: int, file: str, arguments: Any) -> None:
    """In a forked process; leaves without running pytest's exit handlers."""
    status = 1
    signal.alarm(120)  # ends this process, should it wait for ever
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{file}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=60),
        )
        first = sum(SHARDS[ranks][:rank])
        check(lambda t: t[first : first + SHARDS[ranks][rank]], *arguments)
        dist.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run_on_ranks(ranks: int, check: Callable[..., None], *arguments: Any) -> None:
    """check(shard, *arguments) on every rank, where shard cuts its rows out of a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                _child(check, rank, ranks, f"{folder}/init", arguments)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * ranks


@pytest.fixture(autouse=True)
def _one_thread():
    """A fork has only the thread that called it: OpenMP's others must not exist yet or matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grads_of(function: Callable[..., Tensor], hidden: Tensor, *parameters: Tensor) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, *parameters)]
    out = function(*leaves)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaves, upstream)


def check_case(shard: Shard, inputs: Any, options: dict[str, Any], strategy: str) -> None:
    hidden, weight, targets, bias = inputs
    given = [weight] if bias is None else [weight, bias]

    def call(h: Tensor, w: Tensor, b: Tensor | None = None, **more: Any) -> Tensor:
        return spo_ext.token_logprobs(h, w, targets, bias=b, strategy=strategy, **options, **more)

    want, want_grads = grads_of(call, hidden, *given)
    got, grads = grads_of(
        lambda *leaves: call(*leaves, process_group=dist.group.WORLD),
        hidden,
        *(shard(t) for t in given),
    )
    # Each shard's log sum exp is rounded to the result's type before they are merged.
    assert got.dtype == want.dtype and logprob_error(got, want) <= 4 * LOGPROB_TOLERANCE[got.dtype]
    everyone = [torch.empty_like(got) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, got)
    assert all(torch.equal(other, got) for other in everyone)
    tolerance = 4 * GRAD_TOLERANCE[hidden.dtype]
    assert relative_error(grads[0], want_grads[0]) <= tolerance
    for grad, whole in zip(grads[1:], want_grads[1:], strict=True):
        part = shard(whole)
        assert grad.dtype == part.dtype and grad.shape == part.shape
        # A shard of one word has a gradient too small for its own relative error.
        error = (grad.double() - part.double()).norm()
        assert error <= tolerance * max(float(part.double().norm()), 0.01 * float(whole.norm()))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("strategy", ["recompute", "stored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uneven_shards_give_the_whole(ranks, strategy, dtype):
    hidden, weight, targets = head_inputs(60, 1003, 40, dtype)
    targets[::7], targets[1:4] = -100, torch.tensor([0, 1002, 700])
    run_on_ranks(ranks, check_case, (hidden, weight, targets, None), {}, strategy)
    bias = torch.randn(1003).to(dtype)
    options = {"temperature": 0.7, "softcap": 20.0, "logit_scale": 1.3}
    shaped = hidden.detach().view(4, 15, 40), weight, targets.view(4, 15).int(), bias
    run_on_ranks(ranks, check_case, shaped, options, strategy)


@pytest.mark.parametrize("strategy", ["recompute", "stored"])
def test_a_shard_without_a_possible_word(strategy):
    """A vocabulary padded with words of bias -inf, as many as a shard has or fewer."""
    hidden, weight, targets = head_inputs(12, 1003, 24, torch.float32)
    for first, last in ((700, 1003), (0, 700), (650, 1003), (0, 1)):
        bias = torch.randn(1003)
        bias[first:last] = -torch.inf
        possible = bias.isfinite().nonzero().view(-1)
        labels = possible[targets % len(possible)]
        run_on_ranks(2, check_case, (hidden, weight, labels, bias), {}, strategy)
    run_on_ranks(2, check_impossible_label, hidden, weight, torch.full((12,), 1))


def check_impossible_label(shard: Shard, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    bias = torch.zeros(1003)
    bias[:700] = -torch.inf
    logprobs = spo_ext.token_logprobs(
        hidden, shard(weight), targets, bias=shard(bias), process_group=dist.group.WORLD
    )
    assert (logprobs == -torch.inf).all()


@pytest.mark.parametrize("offset", [-2e4, 5e4])
def test_large_logits(offset):
    hidden, weight, targets = head_inputs(12, 1003, 24, torch.float32)
    bias = torch.randn(1003) + offset
    run_on_ranks(2, check_case, (hidden, weight, targets, bias), {}, "recompute")


def check_confident(shard: Shard, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    def call(h: Tensor, w: Tensor) -> Tensor:
        return spo_ext.token_logprobs(h, w, targets, process_group=dist.group.WORLD)

    got, grads = grads_of(call, hidden, shard(weight))
    want, want_grads = grads_of(
        lambda h, w: spo_ext.token_logprobs(h, w, targets), hidden.double(), weight.double()
    )
    assert float(want[0]) > -1e-9 and float(want.min()) < -60
    assert ((got - want).abs() <= 1e-5 * want.abs()).all()
    assert relative_error(grads[0], want_grads[0]) <= 1e-5
    assert relative_error(grads[1], shard(want_grads[1])) <= 1e-5


def test_next_to_one_and_next_to_nothing():
    """1 - p = 1e-10 and p = 1e-30 keep their digits."""
    weight = torch.nn.functional.normalize(torch.randn(1003, 64))
    targets = torch.tensor([5, 900, 5, 900])
    strength = torch.tensor([40.0, 50.0, -70.0, -80.0])
    run_on_ranks(2, check_confident, weight[targets] * strength[:, None], weight, targets)


def check_loss(shard: Shard, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    ref, rewards, q0 = torch.full(targets.shape, -7.0), -torch.rand(3), -torch.rand(3)
    group = dist.group.WORLD
    dist.broadcast(rewards, 0), dist.broadcast(q0, 0)
    arguments = (targets, ref, rewards, q0)

    def call(h: Tensor, w: Tensor, **more: Any) -> Tensor:
        return spo_ext.linear_loss(h, w, *arguments, beta=0.1, objective="squared", **more)

    want, want_grads = grads_of(call, hidden, weight)
    got, grads = grads_of(lambda h, w: call(h, w, process_group=group), hidden, shard(weight))
    assert relative_error(got, want) <= 1e-6
    assert relative_error(grads[0], want_grads[0]) <= 1e-5
    assert relative_error(grads[1], shard(want_grads[1])) <= 1e-5


def test_linear_loss():
    hidden, weight, targets = head_inputs(36, 1003, 24, torch.float32)
    targets[5] = -100
    run_on_ranks(2, check_loss, hidden.detach().view(3, 12, 24), weight, targets.view(3, 12))


def check_frozen(shard: Shard, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    hidden = hidden.detach().requires_grad_()
    frozen = shard(weight.detach())
    out = spo_ext.token_logprobs(hidden, frozen, targets, process_group=dist.group.WORLD)
    (grad,) = torch.autograd.grad(out.sum(), hidden)
    whole = spo_ext.token_logprobs(hidden, weight.detach(), targets)
    assert relative_error(grad, torch.autograd.grad(whole.sum(), hidden)[0]) <= 1e-5


def test_a_frozen_head():
    run_on_ranks(3, check_frozen, *head_inputs(20, 1003, 24, torch.float32))


def check_refusals(shard: Shard, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    def refused(error: type[Exception], match: str, labels: Tensor = targets, **more: Any) -> None:
        with pytest.raises(error, match=match):
            spo_ext.token_logprobs(
                hidden, shard(weight), labels, process_group=dist.group.WORLD, **more
            )

    refused(IndexError, r"targets must be in \[0, 1003\) or ignore_index, got 1003", targets + 1003)
    refused(ValueError, "strategy must be auto, recompute or stored", strategy="frozen")
    refused(ValueError, "return_entropy.* must be left out", return_entropy=True)
    refused(ValueError, "max_dropped_mass must be left out", max_dropped_mass=0.1)


def test_refusals():
    hidden, weight, targets = head_inputs(4, 1003, 8, torch.float32)
    run_on_ranks(2, check_refusals, hidden, weight, targets * 0)
