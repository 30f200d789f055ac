"""The memory contract on the GPU: beyond inputs and gradients at most the workspace plus O(N)."""

from functools import partial

import pytest
import torch
from conftest import head_inputs
from cuda_cases import mib, peak_mib

import spo_ext

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_cuda")]

SLACK_MIB = 4  # the allocator hands out whole blocks
SHAPES = [
    (8192, 128256, 512),  # bf16 logits would take 2 GiB
    (32768, 32000, 256),  # many tokens
    (64, 256000, 2304),  # few tokens, many entries
    (1027, 50257, 770),  # nothing is a multiple of anything
]


def allowed_mib(workspace_mib: int, tokens: int) -> float:
    return workspace_mib + tokens * 128 / 2**20 + SLACK_MIB


@pytest.mark.parametrize("workspace_mib", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, dtype, workspace_mib):
    hidden, weight, targets = head_inputs(*shape, dtype)
    upstream = torch.randn(shape[0])

    def step():
        logprobs = spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=workspace_mib)
        return torch.autograd.grad(logprobs, (hidden, weight), upstream)

    step()  # loads modules
    extra = peak_mib(step) - mib(hidden, weight)
    assert extra <= allowed_mib(workspace_mib, shape[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_dropped_stays_in_the_workspace(dtype):
    """Beside it, a number per token and block is kept, and the pairs take 512 bytes a token."""
    weight = (torch.randn(50257, 770) / 770**0.5).to(dtype).requires_grad_()
    targets = torch.randint(50257, (4099,))
    hidden = (weight.detach()[targets] * 20).requires_grad_()

    def step():
        logprobs = spo_ext.token_logprobs(
            hidden, weight, targets, max_dropped_mass=2.0**-8, workspace_mib=64
        )
        return torch.autograd.grad(logprobs.sum(), (hidden, weight))

    step()
    kept = 4099 * -(-50257 // 256) * 4 / 2**20
    assert peak_mib(step) - mib(hidden, weight) <= kept + allowed_mib(64, 4099)


def test_stored_logits_are_part_of_the_workspace():
    hidden, weight, targets = head_inputs(1024, 32000, 512, torch.bfloat16)  # 125 MiB of logits
    assert spo_ext.explain(hidden, weight, workspace_mib=256).strategy == "stored"

    def step():
        logprobs = spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=256)
        return torch.autograd.grad(logprobs.sum(), (hidden, weight))

    step()
    assert peak_mib(step) - mib(hidden, weight) <= allowed_mib(256, 1024)


def test_a_frozen_head_takes_one_tensor_like_hidden_and_its_low_bytes():
    hidden, weight, targets = head_inputs(8192, 50257, 2048, torch.bfloat16)
    frozen = weight.detach()

    def step():
        logprobs = spo_ext.token_logprobs(hidden, frozen, targets, workspace_mib=64)
        return torch.autograd.grad(logprobs.sum(), hidden)

    step()
    # Rows wait in the workspace with 32 blocks of statistics, whatever it is: O(N).
    assert peak_mib(step) - mib(hidden) <= 1.5 * mib(hidden) + allowed_mib(64, 8192 * 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape):
    inputs = [t.detach() for t in head_inputs(*shape, torch.bfloat16)]
    step = partial(spo_ext.token_logprobs, *inputs, workspace_mib=64)
    step()
    assert peak_mib(step) <= allowed_mib(64, shape[0])


def test_a_view_of_the_states_is_not_copied():
    hidden, weight, targets = head_inputs(64 * 257, 1000, 2048, torch.bfloat16)
    states, labels = hidden.detach().view(64, 257, 2048)[:, :-1], targets.view(64, 257)[:, 1:]
    assert mib(states) > allowed_mib(16, labels.numel())

    def step():
        return spo_ext.token_logprobs(states, weight.detach(), labels, workspace_mib=16)

    step()
    assert peak_mib(step) <= allowed_mib(16, labels.numel())


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_a_gradient_that_nobody_wants_is_not_allocated(wanted):
    hidden, weight, targets = head_inputs(4096, 65536, 2048, torch.bfloat16)
    hidden, weight = (
        t.detach().requires_grad_(name == wanted)
        for name, t in (("hidden", hidden), ("weight", weight))
    )
    leaf = hidden if wanted == "hidden" else weight

    def step():
        logprobs = spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=64)
        return torch.autograd.grad(logprobs.sum(), leaf)

    step()
    assert peak_mib(step) - mib(leaf) <= allowed_mib(64, 4096)


def test_backward_of_logits_in_place_allocates_no_second_logits():
    logits = torch.randn(2048, 50257, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(50257, (2048,))

    def step(inplace):
        scaled = logits * 2
        spo_ext.logprobs_from_logits(scaled, targets, inplace_backward=inplace).sum().backward()
        logits.grad = None

    step(True)
    # logits * 2, its gradient and that of the leaf; in place the first two are one
    assert peak_mib(lambda: step(True)) <= 2 * mib(logits) + SLACK_MIB
    assert peak_mib(lambda: step(False)) > 2 * mib(logits) + SLACK_MIB


def test_losses_take_no_copy_of_their_inputs():
    logprobs = (-torch.rand(2**22)).requires_grad_()
    ref = -torch.rand(2**22)
    offsets = torch.arange(0, 2**22 + 1, 1024)
    q0 = torch.zeros(len(offsets) - 1)

    def step():
        loss = spo_ext.loss(logprobs, ref, q0, q0, beta=0.1, cu_seqlens=offsets)
        return torch.autograd.grad(loss, logprobs)

    step()
    assert peak_mib(step) <= mib(logprobs) + SLACK_MIB  # the gradient
