"""What the CUDA kernels may not do: be tf32, lose a row to a NaN elsewhere, overflow."""

from collections.abc import Iterator

import pytest
import torch
from conftest import head_inputs, logprob_error, relative_error
from cuda_cases import float64_on_gpu, run_head

import spo_ext

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_cuda")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_float32_is_not_tf32(tf32_allowed):
    """tf32 keeps 11 bits. A user who allows it for other products still gets float32 here."""
    hidden, weight, targets = head_inputs(500, 32000, 1024, torch.float32, scale=4.0)
    upstream = torch.randn(500)
    got = spo_ext.token_logprobs(hidden, weight, targets, strategy="recompute")
    grads = torch.autograd.grad(got, (hidden, weight), upstream)
    want, *want_grads = float64_on_gpu(hidden, weight, targets, upstream)
    assert logprob_error(got, want) <= 3e-6
    for grad, true in zip(grads, want_grads, strict=True):
        assert relative_error(grad, true) <= 1e-5
    logits = hidden.detach() @ weight.detach().T  # the same test would notice tf32
    coarse = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert logprob_error(coarse, want) >= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_may_hold_anything(dtype):
    """NaN and infinity in the states of padding reach no gradient: 0 times NaN would be NaN."""
    hidden, weight, targets = head_inputs(400, 5000, 192, dtype)
    ignored = torch.rand(400) < 0.4
    states = hidden.detach().clone()
    states[ignored] = float("nan")
    states[ignored.nonzero()[0]] = float("inf")
    logprobs, entropy, grad_hidden, grad_weight = run_head(
        states, weight, targets.masked_fill(ignored, -100)
    )
    alone = run_head(hidden[~ignored], weight, targets[~ignored])
    assert torch.equal(logprobs[~ignored], alone[0]) and (logprobs[ignored] == 0).all()
    assert (entropy[ignored] == 0).all() and (grad_hidden[ignored] == 0).all()
    assert torch.equal(grad_hidden[~ignored], alone[2])
    assert grad_weight.isfinite().all()
    assert relative_error(grad_weight, alone[3]) <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_upstream_gradient_may_hold_anything(dtype):
    hidden, weight, targets = head_inputs(400, 5000, 192, dtype)
    upstream = torch.randn(400)
    solved = torch.rand(400) < 0.5
    upstream[solved] = 0.0
    with torch.no_grad():
        hidden[solved] = float("nan")
    logprobs = spo_ext.token_logprobs(hidden, weight, targets, strategy="recompute")
    grads = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    assert (grads[0][solved] == 0).all()
    kept = [t.detach()[~solved] for t in (hidden, targets, upstream)]
    _, grad_hidden, grad_weight = float64_on_gpu(kept[0], weight, kept[1], kept[2])
    assert relative_error(grads[0][~solved], grad_hidden) <= 4e-3
    assert relative_error(grads[1], grad_weight) <= 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_without_any_upstream_gradient(dtype):
    hidden, weight, targets = head_inputs(130, 700, 64, dtype)
    logprobs = spo_ext.token_logprobs(hidden, weight, targets, strategy="recompute")
    for grad in torch.autograd.grad(logprobs, (hidden, weight), torch.zeros(130)):
        assert (grad == 0).all()


def test_float16_logits_past_the_largest_float16():
    """Logits of 1e6 in float32, from float16 states: nothing overflows on the way."""
    hidden = torch.full((3, 64), 128.0, dtype=torch.float16)
    hidden[1] = -128.0
    weight = torch.zeros(300, 64, dtype=torch.float16)
    weight[7], weight[8] = 128.0, -128.0
    targets = torch.tensor([7, 8, 9])
    logprobs, entropy, grad_hidden, grad_weight = run_head(hidden, weight, targets)
    assert logprobs.tolist() == [0.0, 0.0, -64.0 * 128 * 128]
    assert entropy.tolist() == [0.0, 0.0, 0.0]
    assert grad_hidden[:2].count_nonzero() == 0 and grad_weight.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_tiny_and_huge_upstream_gradients(scale, dtype):
    """A loss scaled for float16 training, or divided by a large count, loses no digit in the sums
    (the result may leave float16's range, so the truth is rounded to it as well)."""
    hidden, weight, targets = head_inputs(200, 3000, 128, dtype)
    upstream = torch.randn(200) * scale
    logprobs = spo_ext.token_logprobs(hidden, weight, targets, strategy="recompute")
    got = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    want = float64_on_gpu(hidden, weight, targets, upstream)[1:]
    for grad, true in zip(got, want, strict=True):
        rounded = true.to(dtype)
        fits = rounded.isfinite() & (rounded.abs() >= torch.finfo(dtype).tiny)
        assert torch.equal(grad.isinf(), rounded.isinf()) or dtype != torch.float16
        assert relative_error(grad[fits], true[fits]) <= 4e-3


def test_confident_tokens_keep_their_gradient():
    """bf16 states, p from 0.9 to 1 - 1e-7: 1 - p is formed from the other words."""
    vocabulary, depth = 50257, 128
    weight = torch.randn(vocabulary, depth, dtype=torch.bfloat16) / depth**0.5
    targets = torch.randint(vocabulary, (60,))
    strength = torch.linspace(13, 27, 60)[:, None]
    chosen = weight[targets].float()
    hidden = (chosen / chosen.norm(dim=1, keepdim=True) * strength).bfloat16()
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    logprobs = spo_ext.token_logprobs(*inputs, targets, strategy="recompute")
    grads = torch.autograd.grad(logprobs.sum(), inputs)
    want, grad_hidden, _ = float64_on_gpu(hidden, weight, targets, torch.ones(60))
    lost = -torch.expm1(want)
    assert lost.min() < 1e-5 < 0.1 < lost.max()
    assert ((logprobs - want).abs() <= 1e-4 * want.abs() + 1e-9).all()
    error = (grads[0].double() - grad_hidden).norm(dim=1) / grad_hidden.norm(dim=1)
    assert (error <= 1e-2).all()
