"""Identities of the method that hold for any input, tried by hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BETA, FORMS, packed_case, pad, padded

import spo_ext

pytestmark = pytest.mark.usefixtures("device")

LENGTH_LISTS = st.lists(st.integers(0, 7), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)
FEW = settings(max_examples=40)


@FEW
@given(LENGTH_LISTS, SEEDS)
def test_advantages_telescope_to_terminal_q(lengths, seed):
    torch.manual_seed(seed)
    logprobs, ref, a = packed_case("squared", lengths)
    q = spo_ext.soft_q(logprobs, ref, a["q0"], beta=BETA, cu_seqlens=a["cu_seqlens"])
    _, stats = spo_ext.loss(logprobs, ref[None], **a, return_stats=True)
    advantages = BETA * (logprobs - ref)
    for s, (steps, values) in enumerate(
        zip(advantages.split(lengths), q.split(lengths), strict=True)
    ):
        torch.testing.assert_close(
            stats.terminal_q[s] - a["q0"][s], steps.sum(), rtol=1e-12, atol=1e-12
        )
        before = torch.cat([a["q0"][s : s + 1], values[:-1]])[: len(values)]
        torch.testing.assert_close(values - before, steps, rtol=1e-9, atol=1e-12)


@FEW
@given(st.sampled_from(sorted(FORMS)), LENGTH_LISTS, SEEDS)
def test_packed_equals_padded(form, lengths, seed):
    torch.manual_seed(seed)
    case = packed_case(form, lengths)
    if case[0].shape[0] == len(lengths) and form.startswith("advantage, per"):
        return  # [N] or [S]? refused unless every sequence has one token
    packed = spo_ext.loss(case[0], case[1][None], **case[2], reduction="none")
    leaf, ref, rows = padded(*case, lengths)
    assert torch.equal(spo_ext.loss(leaf, ref, **rows, reduction="none"), packed)


@FEW
@given(st.sampled_from(sorted(FORMS)), SEEDS)
def test_order_of_sequences_does_not_matter(form, seed):
    torch.manual_seed(seed)
    leaf, ref, rows = padded(*packed_case(form))
    order = torch.randperm(len(leaf))
    moved = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in rows.items()}
    here = spo_ext.loss(leaf, ref, **rows, reduction="none")[order]
    there = spo_ext.loss(leaf[order], ref[order], **moved, reduction="none")
    # "group" adds its members up in the order they come
    torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)


@FEW
@given(st.integers(1, 6), st.integers(1, 700), st.floats(-1e3, 1e3), SEEDS)
def test_shift_of_the_logits_changes_nothing(tokens, vocabulary, shift, seed):
    torch.manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,))
    a = spo_ext.logprobs_from_logits(logits, targets)
    b = spo_ext.logprobs_from_logits(logits + shift, targets)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-10)


@FEW
@given(st.integers(1, 40), st.integers(1, 600), st.integers(1, 40), st.floats(0.1, 3.0), SEEDS)
def test_permuting_the_vocabulary_changes_nothing(tokens, vocabulary, depth, temperature, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, depth, dtype=torch.float64)
    weight = torch.randn(vocabulary, depth, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,))
    order = torch.randperm(vocabulary)
    moved = torch.empty_like(order).scatter_(0, order, torch.arange(vocabulary))
    a = spo_ext.token_logprobs(hidden, weight, targets, temperature=temperature)
    b = spo_ext.token_logprobs(hidden, weight[order], moved[targets], temperature=temperature)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@FEW
@given(st.integers(1, 500), SEEDS)
def test_probabilities_sum_to_one(vocabulary, seed):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(1, 9), torch.randn(vocabulary, 9)
    logprobs = spo_ext.token_logprobs(
        hidden.expand(vocabulary, 9), weight, torch.arange(vocabulary)
    )
    torch.testing.assert_close(
        logprobs.double().exp().sum(), torch.tensor(1.0).double(), rtol=2e-6, atol=0
    )


@FEW
@given(LENGTH_LISTS, SEEDS)
def test_masking_a_token_removes_it(lengths, seed):
    torch.manual_seed(seed)
    logprobs, ref, a = packed_case("cross_entropy", lengths)
    kept = torch.rand(logprobs.shape) < 0.6
    sizes = [int(k.sum()) for k in kept.split(lengths)]
    masked = spo_ext.loss(logprobs, ref[None], **a, mask=kept, reduction="none")
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    a["cu_seqlens"] = offsets
    cut = spo_ext.loss(logprobs[kept], ref[kept][None], **a, reduction="none")
    assert torch.equal(masked, cut)


def test_pad_is_the_inverse_of_masking():
    packed = torch.arange(6.0)
    rows = pad(packed, [1, 0, 3, 2], -1.0)
    assert rows.shape == (4, 3) and torch.equal(rows[rows >= 0], packed)
