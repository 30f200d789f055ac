"""Gradients keep their digits however large the logits are: beside eager PyTorch in float32, both
against float64 on the same inputs."""

import pytest
import torch
from conftest import relative_error
from torch.nn.functional import linear

import spo_ext

pytestmark = pytest.mark.usefixtures("device")

ROUNDING = 2.0**-23  # an error below it is that of the last bit, and no error
OFFSETS = [0.0, -2e4, 1e3, 5e4]
TEMPERATURES = [0.01, 0.7, 10.0]


def eager(logits, targets, temperature):
    logprobs = (logits / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, targets[:, None])[:, 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def grads(function, inputs, dtype):
    """Of log-probability and entropy apart, for each input."""
    found = []
    for k in (0, 1):
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in inputs]
        result = function(*leaves)[k]
        upstream = torch.linspace(-1, 1, len(result), dtype=dtype)
        found += torch.autograd.grad(result, leaves, upstream)
    return found


def compare(ours, theirs, inputs, slack=1.0):
    """Errors of ours, none above slack times that of theirs."""
    true = grads(theirs, inputs, torch.float64)
    errors = []
    for got, plain, want in zip(
        grads(ours, inputs, torch.float32), grads(theirs, inputs, torch.float32), true, strict=True
    ):
        errors.append(relative_error(got, want))
        assert errors[-1] <= max(slack * relative_error(plain, want), ROUNDING)
    return errors


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("offset", OFFSETS)
def test_logits(offset, temperature):
    targets = torch.randint(3000, (16,))
    errors = compare(
        lambda z: spo_ext.logprobs_from_logits(
            z, targets, temperature=temperature, return_entropy=True
        ),
        lambda z: eager(z, targets, temperature),
        [torch.randn(16, 3000) * 3 + offset],
    )
    assert max(errors) <= 3e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("strategy", ["recompute", "stored"])
def test_head(strategy, offset, temperature):
    targets = torch.randint(900, (16,))
    compare(
        lambda h, w, b: spo_ext.token_logprobs(
            h, w, targets, bias=b, temperature=temperature, return_entropy=True, strategy=strategy
        ),
        lambda h, w, b: eager(linear(h, w, b), targets, temperature),
        [torch.randn(16, 32), torch.randn(900, 32) / 2, torch.randn(900) + offset],
        slack=2.0,  # a product over d has errors of its own, on both sides
    )


@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize("offset", OFFSETS)
def test_frozen_head(offset, scale):
    """dlogprob/dhidden made in the forward pass, also with logits turned upside down."""
    targets, weight = torch.randint(900, (16,)), torch.randn(900, 32) / 2
    bias = torch.randn(900) + offset

    def ours(h):
        logprobs = spo_ext.token_logprobs(h, weight, targets, bias=bias, logit_scale=scale)
        return logprobs, logprobs

    def theirs(h):
        logits = scale * linear(h, weight.to(h.dtype), bias.to(h.dtype))
        return eager(logits, targets, 1.0)[0], eager(logits, targets, 1.0)[0]

    compare(ours, theirs, [torch.randn(16, 32)], slack=2.0)


def test_what_is_dropped_does_not_depend_on_the_offset():
    """The masses of blocks, of which the certificate of the sparse backward pass is made."""
    hidden, weight = torch.randn(20, 32) * 2, torch.randn(4000, 32)
    targets, zeros = torch.randint(4000, (20,)), torch.zeros(4000)
    masses = []
    for offset in (0.0, 32768.0):
        _, mass = spo_ext.token_logprobs(
            hidden.clone().requires_grad_(), weight, targets, bias=zeros + offset,
            max_dropped_mass=2.0**-8, return_dropped_mass=True,
        )  # fmt: skip
        assert (mass <= 2.0**-8).all() and (mass > 0).any()
        masses.append(mass)
    # The CPU adds the offset after the softmax has taken it off; CUDA adds it to the products.
    assert relative_error(*masses) <= (1e-5 if masses[0].device.type == "cpu" else 1e-2)


def test_two_equal_logits_of_any_size():
    for size in (1.0, 1e8, -3e38):
        logits = torch.full((1, 2), size, requires_grad=True)
        logprobs = spo_ext.logprobs_from_logits(logits, torch.tensor([1]))
        logprobs.sum().backward()
        assert logits.grad.tolist() == [[-0.5, 0.5]]
        assert logprobs.item() == pytest.approx(-0.6931472, abs=1e-7)
