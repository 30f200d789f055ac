"""The CUDA kernels at the shapes of real heads, and past every 32-bit index."""

import pytest
import torch
from conftest import GRAD_TOLERANCE, head_inputs, logprob_error, relative_error
from cuda_cases import float64_on_gpu
from tolerances import gpu_logprob_tolerance

import spo_ext

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_cuda")]

HEADS = {
    "Qwen2.5-0.5B": (300, 151936, 896),
    "Llama-2-like": (300, 32000, 2048),
    "GPT-2, odd vocabulary": (257, 50257, 768),
    "Gemma-2-2B": (190, 256000, 2304),
    "Llama-3-8B": (300, 128256, 4096),
    "Llama-3-70B": (130, 128256, 8192),
    "one token": (1, 128256, 4096),
}


def check(hidden, weight, targets):
    upstream = torch.randn(len(hidden))
    got = spo_ext.token_logprobs(hidden, weight, targets, strategy="recompute")
    grads = torch.autograd.grad(got, (hidden, weight), upstream)
    want, *want_grads = float64_on_gpu(hidden, weight, targets, upstream)
    assert logprob_error(got, want) <= gpu_logprob_tolerance(hidden.dtype, hidden.shape[1])
    for grad, true in zip(grads, want_grads, strict=True):
        assert grad.dtype == hidden.dtype
        assert relative_error(grad, true) <= GRAD_TOLERANCE[hidden.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_real_heads(head, dtype):
    check(*head_inputs(*HEADS[head], dtype))


@pytest.mark.parametrize("head", ["Qwen2.5-0.5B", "GPT-2, odd vocabulary", "Llama-3-8B"])
def test_real_heads_in_float32(head):
    check(*head_inputs(*HEADS[head], torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_2_to_the_31_logits_with_every_gradient(dtype):
    tokens, vocabulary = 16500, 131072
    assert tokens * vocabulary > 2**31
    check(*head_inputs(tokens, vocabulary, 64, dtype))


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_more_than_2_to_the_31_elements_of_an_input(which):
    """Only the first and last rows send a gradient back, so the truth stays small."""
    many, few, depth = 2**18 + 8, 320, 8192
    tokens, vocabulary = (many, few) if which == "hidden" else (few, many)
    assert many * depth > 2**31
    hidden, weight, targets = head_inputs(tokens, vocabulary, depth, torch.bfloat16)
    rows = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1])
    targets[rows] = torch.tensor([0, 1, vocabulary // 2, vocabulary - 2, vocabulary - 1])
    upstream = torch.zeros(tokens)
    upstream[rows] = torch.randn(5)
    got = spo_ext.token_logprobs(hidden, weight, targets, strategy="recompute")
    grads = torch.autograd.grad(got, (hidden, weight), upstream)
    want, grad_rows, grad_weight = float64_on_gpu(
        hidden.detach()[rows], weight, targets[rows], upstream[rows]
    )
    assert logprob_error(got[rows], want) <= gpu_logprob_tolerance(torch.bfloat16, depth)
    assert relative_error(grads[0][rows], grad_rows) <= GRAD_TOLERANCE[torch.bfloat16]
    assert grads[0].count_nonzero() == grads[0][rows].count_nonzero()
    assert relative_error(grads[1], grad_weight) <= GRAD_TOLERANCE[torch.bfloat16]


def test_logits_past_2_to_the_31():
    tokens, vocabulary = 16500, 131072
    logits = torch.randn(tokens, vocabulary, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    upstream = torch.randn(tokens)
    got = spo_ext.logprobs_from_logits(logits, targets)
    grad = torch.autograd.grad(got, logits, upstream)[0]
    for rows in (slice(0, 64), slice(tokens - 64, tokens)):
        truth = logits.detach()[rows].double().requires_grad_()
        want = truth.log_softmax(-1).gather(-1, targets[rows, None])[:, 0]
        true = torch.autograd.grad(want, truth, upstream[rows].double())[0]
        assert logprob_error(got[rows], want) <= 3e-6
        assert relative_error(grad[rows], true) <= GRAD_TOLERANCE[torch.bfloat16]


def test_linear_loss_at_a_real_head():
    """End to end in bf16, with a ragged batch, a masked token, and one solved sequence."""
    batch, length, (vocabulary, depth) = 6, 160, HEADS["Qwen2.5-0.5B"][1:]
    hidden, weight, targets = head_inputs(batch * length, vocabulary, depth, torch.bfloat16)
    lengths = torch.tensor([160, 1, 97, 64, 0, 130])
    counted = torch.arange(length) < lengths[:, None]
    targets = targets.view(batch, length).masked_fill(~counted, -100)
    mask = torch.rand(batch, length) < 0.9
    mask[1, 0] = True
    counted &= mask
    ref = torch.randn(batch, length) - 12
    rewards, q0 = -torch.rand(batch), -torch.rand(batch)
    q0[3], rewards[3] = 1e6, 0.0  # y = 1 and Q_T > 0: no gradient
    loss, stats = spo_ext.linear_loss(
        hidden.view(batch, length, depth),
        weight,
        targets,
        ref,
        rewards,
        q0,
        beta=0.05,
        mask=mask,
        return_stats=True,
    )
    grads = torch.autograd.grad(loss, (hidden, weight))

    kept = counted.flatten().nonzero()[:, 0]
    logprobs = torch.zeros(batch * length, dtype=torch.float64)
    upstream = torch.zeros(batch * length)
    args = hidden[kept], weight, targets.flatten()[kept]
    logprobs[kept] = float64_on_gpu(*args, upstream[kept])[0]
    leaf = logprobs.cpu().view(batch, length).requires_grad_()
    with torch.device("cpu"):
        losses = spo_ext.eager.loss(
            leaf,
            ref.cpu().double(),
            rewards.cpu().double(),
            q0.cpu().double(),
            beta=0.05,
            mask=counted.cpu(),
        )
        want = losses.sum() / (counted.any(1).sum().cpu())
        upstream = torch.autograd.grad(want, leaf)[0].flatten()
    _, grad_rows, grad_weight = float64_on_gpu(*args, upstream.to(hidden.device)[kept])
    # as far as the loss moves if every log-probability errs as much as it may
    per_token = gpu_logprob_tolerance(torch.bfloat16, depth) * leaf.detach().abs().clamp(min=1)
    room = float((per_token.flatten() * upstream.abs()).sum())
    assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=room)
    assert stats.num_tokens.tolist() == counted.sum(1).tolist()
    assert relative_error(grads[0][kept], grad_rows) <= GRAD_TOLERANCE[torch.bfloat16]
    assert relative_error(grads[1], grad_weight) <= GRAD_TOLERANCE[torch.bfloat16]
    assert (grads[0].view(batch, length, depth)[~counted] == 0).all()
    assert (grads[0].view(batch, length, depth)[3] == 0).all()
