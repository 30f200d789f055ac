"""logprobs_from_logits against the reference in float64, and its in-place backward."""

import pytest
import torch
from conftest import (
    DTYPES,
    GRAD_TOLERANCE,
    LOGPROB_TOLERANCE,
    doubled,
    eager,
    logprob_error,
    relative_error,
)

import spo_ext

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 507, 50257])
def test_matches_reference(vocabulary, dtype):
    logits = (torch.randn(2, 3, vocabulary) * 3).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (2, 3))
    targets[1, 2] = -100
    got = spo_ext.logprobs_from_logits(logits, targets, temperature=0.8, return_entropy=True)
    truth = doubled(logits)
    want = eager.logprobs_from_logits(truth, targets, temperature=0.8)
    for a, b in zip(got, want, strict=True):
        assert logprob_error(a, b) <= LOGPROB_TOLERANCE[dtype]
    upstream = [torch.randn(2, 3, dtype=torch.float64) for _ in range(2)]
    grad = torch.autograd.grad(got, logits, [u.to(got[0].dtype) for u in upstream])[0]
    rounded = [u.to(got[0].dtype).double() for u in upstream]
    assert (
        relative_error(grad, torch.autograd.grad(want, truth, rounded)[0]) <= GRAD_TOLERANCE[dtype]
    )
    assert (grad[1, 2] == 0).all()


def test_strided_logits_equal_contiguous_ones():
    logits = torch.randn(5, 4, 66).transpose(0, 1)[..., ::3].requires_grad_()
    dense = logits.detach().contiguous().requires_grad_()
    targets = torch.randint(22, (4, 5))
    grads = []
    for tensor in (logits, dense):
        logprobs = spo_ext.logprobs_from_logits(tensor, targets)
        grads.append(torch.autograd.grad(logprobs.square().sum(), tensor)[0])
    assert torch.equal(*grads)


def test_inplace_backward_overwrites_the_logits_with_their_gradient():
    leaf = torch.randn(6, 300, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 299, 7, 1])
    want = torch.autograd.grad(spo_ext.logprobs_from_logits(leaf * 2, targets).sum(), leaf)[0]
    logits = leaf * 2
    pointer = logits.data_ptr()
    spo_ext.logprobs_from_logits(logits, targets, inplace_backward=True).sum().backward()
    assert torch.equal(leaf.grad, want)
    assert logits.data_ptr() == pointer and torch.equal(logits.detach() * 2, want)


def test_inplace_backward_is_noticed_by_whoever_saved_the_logits():
    leaf = torch.randn(4, 30, requires_grad=True)
    logits = leaf * 1.0
    squares = logits.square().sum()  # saves logits
    spo_ext.logprobs_from_logits(logits, torch.arange(4), inplace_backward=True).sum().backward(
        retain_graph=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_inplace_backward_refuses_what_it_would_destroy():
    with pytest.raises(ValueError, match="logits must not be a leaf with inplace_backward"):
        spo_ext.logprobs_from_logits(
            torch.randn(2, 5, requires_grad=True), torch.zeros(2).long(), inplace_backward=True
        )
    row = torch.randn(1, 5, requires_grad=True)
    logprobs = spo_ext.logprobs_from_logits(
        (row * 1).expand(3, 5), torch.zeros(3).long(), inplace_backward=True
    )
    with pytest.raises(ValueError, match="must not overlap itself"):
        logprobs.sum().backward()
