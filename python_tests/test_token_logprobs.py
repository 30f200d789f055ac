"""token_logprobs against the reference in float64, on shapes chosen to be awkward."""

import math

import pytest
import torch
from conftest import (
    DTYPES,
    GRAD_TOLERANCE,
    LOGPROB_TOLERANCE,
    doubled,
    eager,
    head_inputs,
    logprob_error,
    relative_error,
)

import spo_ext

pytestmark = pytest.mark.usefixtures("device")

# (N, V, d) and what each is for.
SHAPES = [
    (5, 1, 3),  # one word: log-probability 0, no gradient
    (1, 7, 8),  # one token; less than a vector of words
    (13, 507, 33),  # odd everywhere; last vocabulary block partly filled
    (14, 256, 64),  # exactly one tile of rows and one block
    (15, 257, 65),  # one more of each
    (200, 1000, 300),  # several row chunks; depth over one accumulation step
    (3, 50257, 96),  # a real vocabulary, many slices
]


def check_against_reference(hidden, weight, targets, grad_scale=1.0, bias=None, **options):
    """Forward and backward of log-probabilities and entropies with random upstream gradients."""
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    logprobs, entropy = spo_ext.token_logprobs(
        hidden, weight, targets, bias=bias, return_entropy=True, **options
    )
    for name in ("workspace_mib", "strategy"):
        options.pop(name, None)
    truth = [doubled(t) for t in inputs]
    want, want_entropy = eager.token_logprobs(
        truth[0], truth[1], targets, bias=truth[2] if bias is not None else None, **options
    )
    dtype = hidden.dtype
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logprob_error(logprobs, want) <= LOGPROB_TOLERANCE[dtype]
    assert logprob_error(entropy, want_entropy) <= 3 * LOGPROB_TOLERANCE[dtype]
    upstream = [torch.randn_like(want) * grad_scale, torch.randn_like(want) * grad_scale]
    got_grads = torch.autograd.grad(
        [logprobs, entropy], inputs, [g.to(logprobs.dtype) for g in upstream]
    )
    upstream = [g.to(logprobs.dtype).double() for g in upstream]
    want_grads = torch.autograd.grad([want, want_entropy], truth, upstream)
    for tensor, got, expected in zip(inputs, got_grads, want_grads, strict=True):
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert relative_error(got, expected) <= GRAD_TOLERANCE[tensor.dtype]


@pytest.mark.parametrize("strategy", ["recompute", "stored"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, strategy):
    check_against_reference(*head_inputs(*shape, dtype), strategy=strategy)


@pytest.mark.parametrize("strategy", ["recompute", "stored"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7),
        dict(logit_scale=0.0625, temperature=1.3),
        dict(softcap=3.0),
        dict(softcap=30.0, logit_scale=2.0, temperature=0.6),
    ],
)
def test_logit_options_and_bias(options, dtype, strategy):
    hidden, weight, targets = head_inputs(40, 700, 50, dtype)
    bias = torch.randn(700).to(dtype).requires_grad_()
    check_against_reference(hidden, weight, targets, bias=bias, strategy=strategy, **options)


def test_mixed_precision_uses_every_operand_as_it_is():
    """bf16 states on an fp32 head, as under autocast or with a master weight: no operand is
    rounded."""
    hidden, weight, targets = head_inputs(30, 300, 40, torch.float32)
    hidden = hidden.detach().bfloat16().requires_grad_()
    check_against_reference(hidden, weight, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_at_a_real_vocabulary(dtype):
    """The promise of the README: 3e-6 for the log-probability, gradients to 1e-5 (float32)."""
    check_against_reference(*head_inputs(64, 50257, 256, dtype, scale=4.0))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_ignored_targets_are_skipped(index_dtype):
    hidden, weight, targets = head_inputs(20, 60, 16, torch.float32)
    ignored = torch.arange(20) % 3 == 0
    with torch.no_grad():
        hidden[ignored] = float("nan")  # a skipped row is never read
    targets = targets.masked_fill(ignored, -100).to(index_dtype)
    logprobs = spo_ext.token_logprobs(hidden, weight, targets)
    kept = spo_ext.token_logprobs(hidden[~ignored], weight, targets[~ignored])
    assert torch.equal(logprobs[~ignored], kept) and (logprobs[ignored] == 0).all()
    logprobs.sum().backward()
    assert (hidden.grad[ignored] == 0).all() and (hidden.grad[~ignored] != 0).any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("case", ["no tokens", "all ignored", "empty batch"])
def test_nothing_to_do(case):
    shape = {"no tokens": (0,), "all ignored": (4,), "empty batch": (0, 5)}[case]
    hidden = torch.randn(*shape, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    logprobs, entropy = spo_ext.token_logprobs(
        hidden, weight, torch.full(shape, -100), return_entropy=True
    )
    assert logprobs.shape == entropy.shape == torch.Size(shape) and (logprobs == 0).all()
    (logprobs.sum() + entropy.sum()).backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_strided_inputs_equal_contiguous_ones():
    """Time-major states, a weight that is a view of a larger one, a transposed weight, a strided
    label."""
    base = torch.randn(7, 3, 20)  # [T, B, d]
    hidden = base.transpose(0, 1)  # [B, T, d], not contiguous
    weight = torch.randn(90, 40)[::2, 1::2]
    targets = torch.randint(45, (3, 14))[:, ::2]
    strided = [hidden.requires_grad_(), weight.requires_grad_()]
    dense = [t.detach().contiguous().requires_grad_() for t in strided]
    results = []
    for h, w in (strided, dense):
        logprobs = spo_ext.token_logprobs(h, w, targets)
        results.append((logprobs, *torch.autograd.grad(logprobs.square().sum(), (h, w))))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("one_minus_p", [0.5, 1e-2, 1e-4, 1e-6, 1e-9, 1e-12])
def test_confident_token_keeps_its_gradient(one_minus_p):
    """p near 1: float32 log_softmax rounds 1 - p to 0 from about 1e-8 on; here it keeps three
    digits."""
    vocabulary = 300
    margin = torch.log(torch.tensor((vocabulary - 1) * (1 - one_minus_p) / one_minus_p)).item()
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.zeros(vocabulary, 1)
    weight[17] = margin
    weight.requires_grad_()
    targets = torch.tensor([17])
    logprobs = spo_ext.token_logprobs(hidden, weight, targets)
    grad_hidden, grad_weight = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    margin_used = weight[17].item()  # as rounded to float32
    # Closed form in float64: even float64 log_softmax keeps only three digits of 1 - p here.
    others = (vocabulary - 1) * math.exp(-margin_used)
    lost = others / (1 + others)
    assert lost == pytest.approx(one_minus_p, rel=1e-3)
    assert logprobs.item() == pytest.approx(-math.log1p(others), rel=1e-6)
    assert grad_weight[17].item() == pytest.approx(lost, rel=1e-5)
    assert grad_hidden.item() == pytest.approx(lost * margin_used, rel=1e-5)


def test_huge_logits():
    """Logits at +-1e4: nothing overflows, and the label may be far below the maximum."""
    hidden = torch.tensor([[1.0], [1.0], [-1.0]])
    weight = torch.tensor([[1e4], [-1e4], [0.0], [9.999e3]])
    targets = torch.tensor([0, 1, 3])
    got = spo_ext.token_logprobs(hidden, weight, targets)
    want = eager.token_logprobs(hidden.double(), weight.double(), targets)[0]
    assert got.isfinite().all() and logprob_error(got, want) <= 3e-6


def test_words_ruled_out_by_bias():
    """bias = -inf removes a word: no probability, no gradient, no NaN; as a label its
    log-probability is -inf."""
    hidden, weight, _ = head_inputs(3, 600, 10, torch.float32)
    bias = torch.zeros(600)
    bias[256:512] = -float("inf")  # one whole vocabulary block
    targets = torch.tensor([0, 255, 599])
    logprobs, entropy = spo_ext.token_logprobs(
        hidden, weight, targets, bias=bias, return_entropy=True
    )
    truth = [doubled(hidden), doubled(weight)]
    kept = torch.cat([torch.arange(256), torch.arange(512, 600)])
    moved = torch.tensor([0, 255, 343])
    want, want_entropy = eager.token_logprobs(truth[0], truth[1][kept], moved)
    assert logprob_error(logprobs, want) <= 3e-6 and logprob_error(entropy, want_entropy) <= 1e-5
    grads = torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
    want_grads = torch.autograd.grad((want + want_entropy).sum(), truth)
    for got, expected in zip(grads, want_grads, strict=True):
        assert relative_error(got, expected) <= 1e-5
    assert (grads[1][256:512] == 0).all()
    impossible = spo_ext.token_logprobs(hidden, weight, torch.tensor([300, 300, 300]), bias=bias)
    assert (impossible == -float("inf")).all()


def test_nan_stays_in_its_row():
    hidden, weight, targets = head_inputs(5, 40, 8, torch.float32)
    with torch.no_grad():
        hidden[2, 3] = float("nan")
    logprobs = spo_ext.token_logprobs(hidden, weight, targets)
    assert logprobs.isnan().tolist() == [False, False, True, False, False]


def test_rows_without_upstream_gradient_are_skipped():
    """A clipped or solved sequence sends zeros back: its rows are not computed, so its NaN does no
    harm."""
    hidden, weight, targets = head_inputs(6, 40, 8, torch.float32)
    with torch.no_grad():
        hidden[4] = float("nan")
    logprobs = spo_ext.token_logprobs(hidden, weight, targets)
    grads = torch.autograd.grad(logprobs, (hidden, weight), torch.tensor([1.0, 1, 1, 1, 0, 1]))
    assert all(g.isfinite().all() for g in grads) and (grads[0][4] == 0).all()


def test_only_the_wanted_gradients():
    hidden, weight, targets = head_inputs(9, 70, 12, torch.float32)
    both = torch.autograd.grad(
        spo_ext.token_logprobs(hidden, weight, targets).sum(), (hidden, weight)
    )
    frozen = spo_ext.token_logprobs(hidden, weight.detach(), targets, strategy="recompute")
    assert torch.equal(torch.autograd.grad(frozen.sum(), hidden)[0], both[0])
    probe = spo_ext.token_logprobs(hidden.detach(), weight, targets)
    assert torch.equal(torch.autograd.grad(probe.sum(), weight)[0], both[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_workspace_gives_the_same_result(dtype, device):
    """Groups of rows, slices of words and the two-pass backward of 16-bit states change nothing,
    bit for bit; on a GPU, the order of the gradients' sums."""
    hidden, weight, targets = head_inputs(700, 900, 256, dtype)
    results = []
    for workspace_mib in (2, 64):
        logprobs = spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=workspace_mib)
        results.append((logprobs, *torch.autograd.grad(logprobs.square().sum(), (hidden, weight))))
    exact = len(results[0]) if device == "cpu" else 1
    for small, large in zip(*(r[:exact] for r in results), strict=True):
        assert torch.equal(small, large)
    for small, large in zip(*(r[exact:] for r in results), strict=True):
        assert relative_error(small, large) <= GRAD_TOLERANCE[dtype]


def test_gradients_are_rounded_once():
    """A bf16 weight gradient is the float32 sum rounded once, however many tokens are added up."""
    hidden, weight, targets = head_inputs(3000, 64, 16, torch.bfloat16)
    grad = torch.autograd.grad(spo_ext.token_logprobs(hidden, weight, targets).sum(), weight)[0]
    truth = [doubled(hidden), doubled(weight)]
    want = torch.autograd.grad(eager.token_logprobs(*truth, targets)[0].sum(), truth[1])[0]
    ulp = want.abs().clamp(min=1e-30).log2().floor().exp2() * 2**-7
    assert ((grad.double() - want).abs() <= 0.51 * ulp + 1e-5 * want.abs().max()).all()


def test_more_than_2_to_the_31_logits():
    """16400 tokens x 131072 words: any 32-bit index would wrap. One channel keeps it quick."""
    tokens, vocabulary = 16400, 131072
    assert tokens * vocabulary > 2**31
    hidden, weight, targets = head_inputs(tokens, vocabulary, 1, torch.float32)
    logprobs = spo_ext.token_logprobs(hidden, weight, targets)
    rows = torch.tensor([0, tokens // 2, tokens - 1])
    truth = [doubled(hidden), doubled(weight)]
    want = eager.token_logprobs(truth[0][rows], truth[1], targets[rows])[0]
    assert logprob_error(logprobs[rows], want) <= 3e-6
    upstream = torch.zeros(tokens)
    upstream[rows] = 1.0  # the other rows are skipped
    grads = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    for got, expected in zip(grads, torch.autograd.grad(want.sum(), truth), strict=True):
        assert relative_error(got, expected) <= 1e-5
