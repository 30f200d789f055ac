"""Errors of log-probabilities and gradients against float64, on the same rounded inputs.

Everything is computed a few rows at a time; gradients are compared on some rows of `hidden` and
some rows of `weight`, since the whole of them in float64 would take longer than what is measured.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from shapes import HeadShape
from states import load_states, synthetic_states, widened
from torch import Tensor

CHUNK_BYTES = 512 << 20
SAMPLE = 256  # rows of hidden, and of weight, whose gradient is compared


@dataclass
class HeadInputs:
    """`hidden` and `targets` hold as many tokens as the noise of Q_T is measured on; only the first
    shape.tokens are timed."""

    shape: HeadShape
    source: str
    hidden: Tensor
    weight: Tensor
    targets: Tensor

    @staticmethod
    def make(shape: HeadShape, device: str) -> "HeadInputs":
        tokens = max(shape.tokens, shape.noise_tokens)
        states = (
            load_states(shape.states)
            if shape.states
            else synthetic_states(tokens, shape.vocabulary, shape.depth, device, shape.dtype)
        )
        hidden, weight = states.hidden * shape.sharpness, states.weight
        if shape.depth > hidden.shape[1]:
            hidden, weight = widened(hidden, weight, shape.depth)
        return HeadInputs(
            shape,
            states.source,
            hidden.to(device, shape.dtype),
            weight.to(device, shape.dtype),
            states.targets.to(device),
        )

    @property
    def tokens(self) -> int:
        return min(self.shape.tokens, len(self.hidden))

    @cached_property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """The timed hidden and weight, which require grad, and targets."""
        n = self.tokens
        hidden = self.hidden[:n].clone()
        return hidden.requires_grad_(), self.weight.detach().requires_grad_(), self.targets[:n]

    @cached_property
    def upstream(self) -> Tensor:
        """Another gradient for every token, as SPO has."""
        return torch.linspace(-1, 1, self.tokens, device=self.hidden.device)

    @cached_property
    def truth(self) -> "Truth":
        return Truth(self)


class Truth:
    def __init__(self, inputs: HeadInputs) -> None:
        self.inputs = inputs
        wide = inputs.weight.detach().double()
        step = max(1, CHUNK_BYTES // (8 * len(wide)))
        lse, label = [], []
        for hidden, targets in zip(
            inputs.hidden.split(step), inputs.targets.split(step), strict=True
        ):
            logits = hidden.double() @ wide.T
            lse.append(logits.logsumexp(-1))
            label.append(logits.gather(-1, targets[:, None])[:, 0])
        self.lse = torch.cat(lse)
        self.logprobs = torch.cat(label) - self.lse
        generator = torch.Generator().manual_seed(1)
        n, v = inputs.tokens, len(wide)
        self.rows = torch.randperm(n, generator=generator)[:SAMPLE].to(wide.device)
        # labels, whose gradient is large, and any words
        anything = torch.randint(v, (SAMPLE,), generator=generator)
        words = torch.cat([inputs.targets[self.rows].cpu(), anything]).unique()
        self.words = words.to(wide.device)

    def grads(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """grad_hidden [rows] and grad_weight [words]."""
        n, wide = self.inputs.tokens, self.inputs.weight.detach().double()
        factor = upstream.double()[:, None]
        states, label = self.inputs.hidden[self.rows].double(), self.inputs.targets[self.rows]
        p = (states @ wide.T - self.lse[self.rows, None]).exp_()
        grad_hidden = factor[self.rows] * (wide[label] - p @ wide)
        some, states = wide[self.words], self.inputs.hidden[:n].double()
        grad_scores = -factor * (states @ some.T - self.lse[:n, None]).exp_()
        grad_scores += factor * (self.inputs.targets[:n, None] == self.words)
        return grad_hidden, grad_scores.T @ states

    def logprob_errors(self, logprobs: Tensor) -> dict[str, float]:
        want = self.logprobs[: len(logprobs)]
        error = logprobs.double() - want
        return {
            "logprob_max": (error.abs() / want.abs().clamp(min=1)).max().item(),
            "logprob_rms": error.square().mean().sqrt().item(),
            "logprob_bias": error.mean().item(),
        }

    def grad_errors(self, grads: tuple[Tensor, ...], upstream: Tensor) -> dict[str, float]:
        """Of (grad_hidden, grad_weight), or of the first alone."""
        named = zip(("hidden", "weight"), (self.rows, self.words), grads, strict=False)
        got = [(name, grad[pick].double()) for name, pick, grad in named]
        pairs = [(name, a, b) for (name, a), b in zip(got, self.grads(upstream), strict=False)]
        return {f"grad_{name}": ((a - b).norm() / b.norm()).item() for name, a, b in pairs}

    def noise(self, logprobs: Tensor) -> dict[str, float]:
        """Root mean square over completions of the error of a sum of T log-probabilities: what the
        head adds to Q_T / beta."""
        error = logprobs.double() - self.logprobs[: len(logprobs)]
        out, length = {}, 64
        while length <= len(error):
            sums = error[: len(error) // length * length].view(-1, length).sum(1)
            out[str(length)] = sums.square().mean().sqrt().item()
            length *= 4
        return out
