"""The choice of the way that the backward pass of the LM head takes.

One head GEMM, 2 N d V operations, is the unit. All strategies compute the same gradient.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

# Of the kernels, in MiB, where the caller leaves it open. A GPU starts its kernels again for every
# slice of the vocabulary that fits.
_WORKSPACE_MIB = {"cpu": 64, "cuda": 256}


def default_workspace_mib(hidden: Tensor) -> int:
    return _WORKSPACE_MIB.get(hidden.device.type, 64)


Strategy = Literal["auto", "recompute", "stored", "frozen", "sparse"]


Chosen = Literal["none", "recompute", "stored", "frozen", "sparse"]

# What the forward op keeps for the backward op (csrc/kept.h).
KEEP: dict[Chosen, str] = {
    "none": "nothing",
    "recompute": "nothing",
    "stored": "logits",
    "frozen": "jacobian",
    "sparse": "dropped",
}


@dataclass(frozen=True)
class BackwardPlan:
    """What `explain` answers.

    strategy: "none" if no gradient is wanted; else, with the cost of forward and backward,
        "recompute": the backward pass computes the logits again. 4 GEMMs; no memory beyond the
            workspace.
        "stored": the forward pass keeps the products hidden weight^T. 3 GEMMs; N V numbers.
        "frozen": the forward pass makes dlogprob/dhidden beside the log-probabilities, and the
            backward pass scales it. 2 GEMMs; one tensor like hidden, and on CUDA a byte per number
            more while it is made.
        "sparse": max_dropped_mass > 0. The backward pass visits only the blocks that some
            probability above it lies in: 1 + 3 a GEMMs, where a is the share of (token, block)
            pairs kept; the exact way if a is above 0.9, on CUDA above 1/2 or 64 blocks a token.
            N V / 256 numbers.
    reason: why, in words.
    launches: of CUDA kernels, forward and backward; None on the CPU.
    moved_mib: what the products of these kernels read and write of the GPU's memory, each operand
        once; None on the CPU, and for "sparse", where it depends on the probabilities.
    """

    strategy: Chosen
    reason: str
    launches: int | None = None
    moved_mib: int | None = None


@dataclass(frozen=True)
class HeadCall:
    """What the choice depends on. Nothing here formats a size: under torch.compile it may be a
    symbol."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    return_entropy: bool
    max_dropped_mass: float
    workspace_mib: int

    @property
    def head_trains(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @property
    def needs_backward(self) -> bool:
        return torch.is_grad_enabled() and (self.head_trains or self.hidden.requires_grad)

    @property
    def logits_bytes(self) -> int:
        size = 8 if self.hidden.dtype == torch.float64 else 4
        return math.prod(self.hidden.shape[:-1]) * self.weight.shape[0] * size

    @property
    def logits_fit(self) -> bool:
        """Whether the logits fit, for all sizes that torch.compile or torch.export leaves open."""
        fits = 2 * self.logits_bytes <= self.workspace_mib * 2**20
        if not torch.compiler.is_compiling():
            return fits
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(fits)


def _check(strategy: Strategy, call: HeadCall) -> None:
    def refuse(problem: str) -> None:
        raise ValueError(f"token_logprobs: strategy must {problem}")

    if strategy not in get_args(Strategy):
        refuse(f"be one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    if not call.needs_backward:
        return
    if strategy == "frozen" and call.head_trains:
        refuse("not be frozen when weight or bias requires grad")
    if strategy == "frozen" and call.return_entropy:
        refuse("not be frozen with return_entropy")


def choose(strategy: Strategy, call: HeadCall) -> Chosen:
    _check(strategy, call)
    if not call.needs_backward:
        return "none"
    if strategy != "auto":
        return strategy
    if call.max_dropped_mass > 0:
        return "sparse"
    if not call.head_trains and not call.return_entropy:
        return "frozen"
    return "stored" if call.logits_fit else "recompute"


def plan(strategy: Strategy, call: HeadCall) -> BackwardPlan:
    """The choice, and why."""
    chosen = choose(strategy, call)
    if chosen != "none" and strategy != "auto":
        return BackwardPlan(chosen, "asked for")
    logits = f"the logits take {call.logits_bytes / 2**20:.1f} MiB"
    half = f"half of the workspace of {call.workspace_mib} MiB"
    reasons = {
        "none": "no gradient is wanted",
        "sparse": f"max_dropped_mass is {call.max_dropped_mass:g}",
        "frozen": "weight needs no gradient: dlogprob/dhidden comes from the forward's logits",
        "stored": f"{logits}, no more than {half}",
        "recompute": f"{logits}, more than {half}",
    }
    return BackwardPlan(chosen, reasons[chosen])
