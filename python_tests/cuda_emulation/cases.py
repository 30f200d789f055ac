"""Calls of the LM head that the emulated CUDA kernels and the CPU's both answer."""

import torch
from conftest import LOGPROB_TOLERANCE, logprob_error, relative_error
from torch import Tensor

# A 16-bit dz is rounded before it is multiplied, and the product once more.
GRAD_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 6e-4,
    torch.bfloat16: 5e-3,
}


# Hopper's kernels multiply 16-bit numbers alone; elsewhere "hopper" would repeat "portable".
KERNELS = [("portable", torch.float32), ("portable", torch.bfloat16), ("hopper", torch.bfloat16)]
# For what may depend on how each type is read, rounded and stored.
ALL_KERNELS = [
    *KERNELS,
    ("portable", torch.float64),
    ("portable", torch.half),
    ("hopper", torch.half),
]


def everywhere(*shapes: tuple) -> list[tuple]:
    """(kernels, shape): the first shape with all kernels."""
    return [(k, shape) for shape in shapes for k in (ALL_KERNELS, KERNELS)[shape != shapes[0]]]


class Case:
    """One call of both ops on the same inputs."""

    def __init__(self, tokens: tuple[int, ...], depth: int, vocabulary: int, dtype: torch.dtype):
        self.hidden = torch.randn(*tokens, depth).to(dtype)
        self.weight = (torch.randn(vocabulary, depth) * (2 / depth**0.5)).to(dtype)
        self.targets = torch.randint(0, vocabulary, tokens)
        self.bias: Tensor | None = None
        self.options = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None}
        self.entropy = False
        self.needs = [True, True, False]
        self.keep, self.max_dropped_mass = "nothing", 0.0
        self.workspace_mib = 64  # of the emulated op; the CPU's needs more at times
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.grad = torch.randn(tokens, dtype=wide)
        self.grad_entropy: Tensor | None = None

    def forward(self, ops) -> tuple[Tensor, ...]:
        return ops.token_logprobs(
            self.hidden,
            self.weight,
            self.targets,
            self.bias,
            *self.options.values(),
            -100,
            self.entropy,
            64 if ops is torch.ops.spo else self.workspace_mib,
            self.keep,
            self.max_dropped_mass,
        )

    def backward(self, ops, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ops.token_logprobs_backward(
            self.grad,
            self.grad_entropy,
            self.hidden,
            self.weight,
            self.targets,
            self.bias,
            *saved,
            *self.options.values(),
            -100,
            self.needs,
            64 if ops is torch.ops.spo else self.workspace_mib,
            self.keep,
        )

    def check(self, emulated) -> None:
        want, saved = self.forward(torch.ops.spo), self.forward(emulated)
        for got, expected in zip(saved[:-1], want[:-1], strict=True):
            assert logprob_error(got, expected) <= LOGPROB_TOLERANCE[self.hidden.dtype]
        assert saved[-1].shape == want[-1].shape and saved[-1].dtype == want[-1].dtype
        got_grads = self.backward(emulated, (*want[:-1], saved[-1]))
        inputs = (self.hidden, self.weight, self.bias)
        for tensor, got, expected in zip(
            inputs, got_grads, self.backward(torch.ops.spo, want), strict=True
        ):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            if tensor is not None:
                assert relative_error(got, expected) <= GRAD_TOLERANCE[self.hidden.dtype]
