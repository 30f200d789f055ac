"""The ways of the backward pass: the same gradient from each, and the one that is chosen."""

import pytest
import torch
from conftest import (
    DTYPES,
    GRAD_TOLERANCE,
    doubled,
    eager,
    head_inputs,
    relative_error,
)

import spo_ext

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(5, 1, 3), (1, 7, 8), (13, 507, 33), (15, 257, 65), (200, 1000, 300), (3, 50257, 96)]
OPTIONS = [dict(), dict(softcap=3.0, temperature=0.7, logit_scale=1.5)]


def frozen_head(*arguments):
    hidden, weight, targets = head_inputs(*arguments)
    return hidden, weight.detach(), targets


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_frozen_head_has_the_same_gradient(shape, dtype, options):
    hidden, weight, targets = frozen_head(*shape, dtype)
    bias = torch.randn(shape[1]).to(dtype)
    targets[-1] = -100
    truth = doubled(hidden)
    want, _ = eager.token_logprobs(truth, doubled(weight), targets, bias=doubled(bias), **options)
    upstream = torch.randn(shape[0], dtype=torch.float32)
    upstream[0] = 0 if shape[0] > 2 else 1
    (want_grad,) = torch.autograd.grad(want, truth, upstream.double())
    got = spo_ext.token_logprobs(hidden, weight, targets, bias=bias, strategy="frozen", **options)
    (grad,) = torch.autograd.grad(got, hidden, upstream.to(got.dtype))
    assert grad.dtype == dtype and grad.shape == hidden.shape
    assert relative_error(grad, want_grad) <= GRAD_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(13, 507, 33), (200, 9000, 40)])
def test_log_probabilities_are_the_same_to_the_last_bit(shape, dtype):
    hidden, weight, targets = frozen_head(*shape, dtype)
    with torch.no_grad():
        plain = spo_ext.token_logprobs(hidden, weight, targets)
    for strategy in ("recompute", "stored", "frozen"):
        for workspace_mib in (3, 64):
            got = spo_ext.token_logprobs(
                hidden, weight, targets, strategy=strategy, workspace_mib=workspace_mib
            )
            assert torch.equal(got, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_logits_give_the_gradient_of_computed_ones_to_the_last_bit(dtype):
    hidden, weight, targets = head_inputs(150, 1000, 72, dtype)
    bias = torch.randn(1000).to(dtype).requires_grad_()
    targets[20:40] = -100
    results = []
    for strategy in ("recompute", "stored"):
        logprobs, entropy = spo_ext.token_logprobs(
            hidden, weight, targets, bias=bias, return_entropy=True, strategy=strategy
        )
        loss = (logprobs * torch.linspace(-1, 1, 150) + entropy.sin()).sum()
        results.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    for computed, stored in zip(*results, strict=True):
        assert torch.equal(computed, stored)


@pytest.mark.parametrize("strategy", ["stored", "frozen"])
def test_rows_that_do_not_count_are_never_read(strategy):
    hidden, weight, targets = frozen_head(20, 60, 16, torch.float32)
    ignored = torch.arange(20) % 3 == 0
    with torch.no_grad():
        hidden[ignored] = float("nan")
    logprobs = spo_ext.token_logprobs(
        hidden, weight, targets.masked_fill(ignored, -100), strategy=strategy
    )
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert (grad[ignored] == 0).all() and (grad[~ignored] != 0).any(1).all()


def test_a_row_without_gradient_may_be_anything():
    hidden, weight, targets = frozen_head(4, 60, 16, torch.float32)
    with torch.no_grad():
        hidden[2] = float("inf")
    logprobs = spo_ext.token_logprobs(hidden, weight, targets, strategy="frozen")
    (grad,) = torch.autograd.grad(logprobs, hidden, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert grad.isfinite().all() and (grad[2] == 0).all()


@pytest.mark.parametrize("one_minus_p", [0.5, 1e-4, 1e-8, 1e-12])
def test_a_confident_token_keeps_its_gradient(one_minus_p):
    vocabulary = 300
    margin = torch.log(torch.tensor((vocabulary - 1) * (1 - one_minus_p) / one_minus_p)).item()
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.zeros(vocabulary, 1)
    weight[17] = margin
    logprobs = spo_ext.token_logprobs(hidden, weight, torch.tensor([17]), strategy="frozen")
    logprobs.sum().backward()
    assert hidden.grad.item() == pytest.approx(margin * one_minus_p, rel=2e-4)


def test_gradcheck():
    hidden, weight, targets = frozen_head(4, 11, 5, torch.float64)
    torch.autograd.gradcheck(
        lambda h: spo_ext.token_logprobs(h, weight, targets, softcap=2.0, strategy="frozen"),
        (hidden,),
    )


@pytest.mark.parametrize("strategy", ["recompute", "stored", "frozen"])
def test_compiles_and_has_no_second_derivative(strategy):
    hidden, weight, targets = frozen_head(9, 30, 8, torch.float32)

    def step(h):
        return spo_ext.token_logprobs(h, weight, targets, strategy=strategy).square().sum()

    (want,) = torch.autograd.grad(step(hidden), hidden)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden), hidden)
    assert torch.allclose(got, want, atol=1e-6)
    (first,) = torch.autograd.grad(step(hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        first.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_compiles_for_any_number_of_tokens(frozen, eps):
    def step(hidden, weight, targets):
        return spo_ext.token_logprobs(hidden, weight, targets, max_dropped_mass=eps).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 17):
        hidden, weight, targets = head_inputs(tokens, 30, 8, torch.float32)
        if frozen:
            weight = weight.detach()
        (got,) = torch.autograd.grad(compiled(hidden, weight, targets), hidden)
        (want,) = torch.autograd.grad(step(hidden, weight, targets), hidden)
        assert torch.allclose(got, want, atol=1e-6)


def test_explain():
    hidden, weight, _ = head_inputs(100, 1000, 8, torch.float32)
    assert spo_ext.explain(hidden, weight).strategy == "stored"  # 0.4 MiB
    wide = weight.detach().expand(200, 1000, 8).reshape(200_000, 8).requires_grad_()
    plan = spo_ext.explain(hidden, wide)
    assert plan.strategy == "recompute" and "76.3 MiB" in plan.reason
    assert spo_ext.explain(hidden, wide, workspace_mib=160).strategy == "stored"
    assert spo_ext.explain(hidden, weight.detach()).strategy == "frozen"
    bias = torch.zeros(1000, requires_grad=True)
    assert spo_ext.explain(hidden, weight.detach(), bias=bias).strategy == "stored"
    assert spo_ext.explain(hidden, weight.detach(), return_entropy=True).strategy == "stored"
    assert spo_ext.explain(hidden.detach(), weight.detach()).strategy == "none"
    with torch.no_grad():
        assert spo_ext.explain(hidden, weight).strategy == "none"


def test_refusals():
    hidden, weight, targets = head_inputs(5, 9, 4, torch.float32)
    with pytest.raises(ValueError, match="strategy must not be frozen when weight or bias"):
        spo_ext.token_logprobs(hidden, weight, targets, strategy="frozen")
    with pytest.raises(ValueError, match="strategy must not be frozen with return_entropy"):
        spo_ext.token_logprobs(
            hidden, weight.detach(), targets, return_entropy=True, strategy="frozen"
        )


def test_linear_loss_passes_it_on():
    hidden, weight, targets = frozen_head(12, 40, 6, torch.float32)
    ref, ends = torch.zeros(12), torch.tensor([0, 5, 12])
    grads = []
    for strategy in ("recompute", "frozen"):
        loss = spo_ext.linear_loss(
            hidden, weight, targets, ref, torch.tensor([1.0, 0.0]), torch.zeros(2),
            beta=0.1, objective="squared", cu_seqlens=ends, strategy=strategy,
        )  # fmt: skip
        grads.append(torch.autograd.grad(loss, hidden)[0])
    assert relative_error(*grads) < 1e-5
