"""Bitwise promises on the GPU, at sizes where several tiles, groups of rows and slices of words are
in play."""

import pytest
import torch
from conftest import GRAD_TOLERANCE, head_inputs, relative_error
from cuda_cases import Outputs, assert_same_bits, run_head

import spo_ext

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_cuda")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPE = (1100, 32000, 512)


def assert_same_tokens(got: Outputs, want: Outputs) -> None:
    """Log-probabilities and entropies bit for bit, grad_hidden but for the order of its sums: it is
    added up over slices of the vocabulary, whose width depends on the number of tokens and on
    workspace_mib. (A float16 one is also scaled by the largest gradient of the batch.)"""
    assert_same_bits(got[:2], want[:2])
    assert relative_error(got[2], want[2]) <= GRAD_TOLERANCE[want[2].dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_alone_in_any_batch_order_or_slice(dtype):
    hidden, weight, targets = head_inputs(*SHAPE, dtype)
    whole = run_head(hidden, weight, targets)[:3]
    order = torch.randperm(len(hidden))
    permuted = run_head(hidden[order], weight, targets[order])
    assert_same_tokens(permuted, tuple(t[order] for t in whole))
    # one row, rows of one tile, across tiles, all but one, a tile and one more
    for first, last in (
        (0, 1),
        (777, 778),
        (1099, 1100),
        (13, 29),
        (100, 400),
        (1, 1100),
        (0, 129),
    ):
        part = run_head(hidden[first:last], weight, targets[first:last])
        assert_same_tokens(part, tuple(t[first:last] for t in whole))


def test_a_much_larger_batch_changes_nothing():
    hidden, weight, targets = head_inputs(20000, 50257, 128, torch.bfloat16)
    whole = run_head(hidden, weight, targets)[:3]
    for first, last in ((0, 64), (9999, 10001), (19990, 20000)):
        part = run_head(hidden[first:last], weight, targets[first:last])
        assert_same_tokens(part, tuple(t[first:last] for t in whole))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_and_ignored_neighbours_change_nothing(dtype):
    hidden, weight, targets = head_inputs(240, 3000, 96, dtype)
    packed = run_head(hidden, weight, targets)
    rows = run_head(hidden.view(8, 30, 96), weight, targets.view(8, 30))
    assert_same_bits(rows, packed)
    kept = torch.rand(240) < 0.5
    some = run_head(hidden, weight, targets.masked_fill(~kept, -100))
    alone = run_head(hidden[kept], weight, targets[kept])
    assert_same_bits(tuple(t[kept] for t in some[:3]), alone[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal_even_on_a_busy_gpu(dtype):
    inputs = head_inputs(*SHAPE, dtype)
    first = run_head(*inputs)
    noise, busy = torch.randn(4096, 4096), torch.cuda.Stream()
    for _ in range(4):
        busy.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(busy):  # blocks start in another order and share the chip
            for _ in range(10):
                noise = (noise @ noise).tanh()
        assert_same_bits(run_head(*inputs), first)
    torch.cuda.current_stream().wait_stream(busy)


def test_streams_give_the_same_bits():
    inputs = head_inputs(*SHAPE, torch.bfloat16)
    first = run_head(*inputs)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:  # all three are under way at once
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(run_head(*inputs))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_workspace_changes_no_logprob(dtype):
    inputs = head_inputs(*SHAPE, dtype)
    small = run_head(*inputs, workspace_mib=16)
    large = run_head(*inputs, workspace_mib=512)
    assert_same_tokens(small, large)
    assert relative_error(small[3], large[3]) <= GRAD_TOLERANCE[dtype]


def test_losses_and_q_values_are_equal_in_every_run_and_batch():
    logprobs, ref = -torch.rand(64, 3000), -torch.rand(64, 3000)
    rewards, q0 = -torch.rand(64), -torch.rand(64)

    def run(rows):
        leaf = logprobs[rows].requires_grad_()
        losses = spo_ext.loss(leaf, ref[rows], rewards[rows], q0[rows], beta=0.1, reduction="none")
        q = spo_ext.soft_q(logprobs[rows], ref[rows], q0[rows], beta=0.1)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0], q

    whole = run(slice(None))
    assert_same_bits(run(slice(None)), whole)
    for rows in (slice(0, 1), slice(17, 40)):
        assert_same_bits(run(rows), tuple(t[rows] for t in whole))


@pytest.mark.parametrize("dtype", DTYPES)
def test_advantages_are_exactly_zero_at_equal_weights(dtype):
    hidden, weight, targets = head_inputs(512, 32000, 256, dtype)
    policy = spo_ext.token_logprobs(hidden, weight, targets)
    with torch.no_grad():
        parts = zip(hidden.split(100), targets.split(100), strict=True)
        scored = torch.cat([spo_ext.token_logprobs(h, weight, t) for h, t in parts])
    assert torch.equal(policy.detach(), scored)
