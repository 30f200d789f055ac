"""Which way the backward pass of the LM head takes.

One head GEMM, 2 N d V operations, is the unit. All strategies compute the same gradient.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Strategy = Literal["auto", "recompute", "stored", "frozen", "sparse"]


@dataclass(frozen=True)
class BackwardPlan:
    """What `explain` answers.

    strategy: "none" if no gradient is wanted; else, with the cost of forward and backward,
        "recompute": the backward pass computes the logits again. 4 GEMMs; no memory beyond the
            workspace.
        "stored": the forward pass keeps the products hidden weight^T. 3 GEMMs; N V numbers.
        "frozen": the forward pass makes dlogprob/dhidden beside the log-probabilities, and the
            backward pass scales it. 2 GEMMs; one tensor like hidden.
        "sparse": max_dropped_mass > 0. The backward pass visits only the blocks of words that some
            probability above it lies in: 1 + 3 a GEMMs, where a is the share of (token, block)
            pairs kept; it computes all of them if a is above 0.9. N V / 256 numbers. CPU only.
    reason: why, in words.
    """

    strategy: Literal["none", "recompute", "stored", "frozen", "sparse"]
    reason: str

    @property
    def keep(self) -> str:
        """What the forward op keeps (csrc/kept.h)."""
        kept = {"stored": "logits", "frozen": "jacobian", "sparse": "dropped"}
        return kept.get(self.strategy, "nothing")


def choose(
    strategy: Strategy,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    return_entropy: bool,
    max_dropped_mass: float,
    workspace_mib: int,
) -> BackwardPlan:
    if strategy not in get_args(Strategy):
        raise ValueError(
            f"token_logprobs: strategy must be one of {', '.join(get_args(Strategy))}, "
            f"got {strategy!r}"
        )
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_trains or hidden.requires_grad):
        return BackwardPlan("none", "no gradient is wanted")
    if strategy == "frozen" and head_trains:
        raise ValueError(
            "token_logprobs: strategy must not be frozen when weight or bias requires grad"
        )
    if strategy == "sparse" and hidden.device.type != "cpu":
        raise ValueError(
            "token_logprobs: strategy must not be sparse but on the CPU, "
            f"got hidden on {hidden.device.type}"
        )
    if strategy == "frozen" and return_entropy:
        raise ValueError("token_logprobs: strategy must not be frozen with return_entropy")
    if strategy != "auto":
        return BackwardPlan(strategy, "asked for")
    if max_dropped_mass > 0 and hidden.device.type == "cpu":
        return BackwardPlan("sparse", f"max_dropped_mass is {max_dropped_mass:g}")
    if not head_trains and not return_entropy:
        return BackwardPlan(
            "frozen", "weight needs no gradient: dlogprob/dhidden comes from the forward's logits"
        )
    size = 8 if hidden.dtype == torch.float64 else 4
    mib = hidden.numel() // max(hidden.shape[-1], 1) * weight.shape[0] * size / 2**20
    if mib <= workspace_mib / 2:
        return BackwardPlan(
            "stored", f"the logits take {mib:.1f} MiB, no more than half of the workspace"
        )
    return BackwardPlan(
        "recompute",
        f"the logits take {mib:.1f} MiB, more than half of the workspace of {workspace_mib} MiB",
    )
