"""Inputs that a GPU kernel likes least: odd sizes, slices that start between two 16-byte words,
views, other integer types. They take other load paths, so each is compared with the truth."""

import pytest
import torch
from conftest import (
    GRAD_TOLERANCE,
    LOGPROB_TOLERANCE,
    eager,
    head_inputs,
    logprob_error,
    relative_error,
)
from cuda_cases import assert_same_bits, float64_on_gpu, run_head
from tolerances import gpu_logprob_tolerance

import spo_ext

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_cuda")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(hidden, weight, targets):
    """hidden [.., d] and weight as they are, strides and all."""
    inputs = [t.detach().requires_grad_() for t in (hidden, weight)]
    upstream = torch.randn(targets.shape)
    got = spo_ext.token_logprobs(*inputs, targets, strategy="recompute")
    grads = torch.autograd.grad(got, inputs, upstream)
    depth = hidden.shape[-1]
    want, *want_grads = float64_on_gpu(
        hidden.reshape(-1, depth), weight, targets.reshape(-1), upstream.reshape(-1)
    )
    assert logprob_error(got.flatten(), want) <= gpu_logprob_tolerance(hidden.dtype, depth)
    for grad, true in zip(grads, want_grads, strict=True):
        assert relative_error(grad.reshape(true.shape), true) <= GRAD_TOLERANCE[hidden.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 65, 129, 1027])
def test_odd_token_counts(tokens, dtype):
    check(*head_inputs(tokens, 1003, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 255, 257, 1000, 50257])
def test_odd_vocabularies(vocabulary, dtype):
    check(*head_inputs(70, vocabulary, 72, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 2, 7, 8, 33, 130, 1001, 1032])
def test_depths_that_are_not_multiples_of_a_vector(depth, dtype):
    check(*head_inputs(140, 515, depth, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 2, 4])
def test_slices_that_start_between_two_vectors(shift, dtype):
    hidden, weight, targets = head_inputs(131, 700, 136, dtype)
    depth = 128
    check(hidden[:, shift : shift + depth], weight[:, shift : shift + depth], targets)
    check(hidden[shift:], weight[shift:], targets[shift:].clamp(max=699 - shift))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [64, 65])
def test_all_states_but_the_last(depth, dtype):
    """What every trainer passes: hidden[:, :-1] of [B, T, d] and the labels one to the right."""
    hidden, weight, _ = head_inputs(5 * 40, 900, depth, dtype)
    tokens = torch.randint(900, (5, 40), dtype=torch.int32)
    view = hidden.detach().view(5, 40, depth)[:, :-1]
    assert not view.is_contiguous()
    check(view, weight, tokens[:, 1:])
    leaf = hidden.detach().view(5, 40, depth).requires_grad_()
    spo_ext.token_logprobs(
        leaf[:, :-1], weight, tokens[:, 1:], strategy="recompute"
    ).sum().backward()
    assert (leaf.grad[:, -1] == 0).all() and (leaf.grad[:, :-1] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_no_bit(dtype, monkeypatch):
    """Time-major states, every second word, a transposed weight, expanded states, int32 labels.
    Within one kernel: on Hopper strided inputs take the portable one."""
    monkeypatch.setenv("SPO_HOPPER", "0")
    base = torch.randn(9, 13, 64).to(dtype)
    words = torch.randn(64, 800).to(dtype)
    targets = torch.randint(400, (13, 18))[:, ::2]
    hidden, weight = base.transpose(0, 1), words.T[::2]
    want = run_head(hidden.contiguous(), weight.contiguous(), targets.contiguous())
    assert_same_bits(run_head(hidden, weight, targets.int()), want)
    one = base[:1, :1].expand(9, 13, 64)
    want = run_head(one.contiguous(), weight.contiguous(), targets.T.contiguous())
    assert_same_bits(run_head(one, weight, targets.T), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_little_whatever_the_kernels(dtype):
    base, words = torch.randn(9, 13, 64).to(dtype), (torch.randn(64, 800) / 8).to(dtype)
    check(base.transpose(0, 1), words.T[::2], torch.randint(400, (13, 18))[:, ::2])
    check(base[:1, :1].expand(9, 13, 64), words.T[::2], torch.randint(400, (9, 13)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 8191, 50257])
def test_strided_and_misaligned_logits(vocabulary, dtype):
    wide = torch.randn(37, 2 * vocabulary + 3).to(dtype)
    for view in (wide[:, 1 : vocabulary + 1], wide[:, 3::2], wide[::2, :vocabulary]):
        logits = view.detach().requires_grad_()
        size = logits.shape[1]
        targets = torch.randint(size, logits.shape[:1], dtype=torch.int32)
        upstream = torch.randn(len(logits))
        got = spo_ext.logprobs_from_logits(logits, targets)
        grad = torch.autograd.grad(got, logits, upstream)[0]
        truth = view.detach().double().requires_grad_()
        want = eager.logprobs_from_logits(truth, targets)[0]
        true = torch.autograd.grad(want, truth, upstream.double())[0]
        assert logprob_error(got, want) <= LOGPROB_TOLERANCE[dtype]
        assert relative_error(grad, true) <= GRAD_TOLERANCE[dtype]


@pytest.mark.parametrize("case", ["no tokens", "no counted token", "empty batch"])
def test_nothing_to_do(case):
    shape = {"no tokens": (0,), "no counted token": (300,), "empty batch": (0, 7)}[case]
    hidden = torch.randn(*shape, 64, dtype=torch.bfloat16)
    weight = torch.randn(1000, 64, dtype=torch.bfloat16)
    hidden.fill_(float("nan"))
    out = run_head(hidden, weight, torch.full(shape, -100))
    assert out[0].shape == shape
    assert all((t == 0).all() for t in out)
