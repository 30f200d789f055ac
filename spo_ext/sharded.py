"""token_logprobs of an LM head whose vocabulary is split over the ranks of a process group.

Every rank has the same hidden states and its own rows of the weight. A rank runs the operators of
one device on its rows; two numbers per token are gathered, and grad_hidden is summed. The label
of a token is in one shard. Elsewhere the operators are given entry 0 in its place, and the backward
pass a log-probability that makes the gradient of entry 0 that of any other entry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from spo_ext.strategy import KEEP, HeadCall, Strategy, choose

_OPS = torch.ops.spo
_IGNORED = -100  # in local targets


class Scales(NamedTuple):
    """The scales of the logits, in the order in which the operators take them."""

    temperature: float
    logit_scale: float
    softcap: float | None

    def outer(self, dtype: torch.dtype) -> float:
        """What unscaled logits of that dtype are multiplied by (csrc/math/logit_map.h)."""
        outer = (abs(self.logit_scale) if self.softcap is None else self.softcap) / self.temperature
        return torch.tensor(outer, dtype=dtype).item()


def sharded_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scales: Scales,
    ignore_index: int,
    strategy: Strategy,
    workspace_mib: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """See `token_logprobs` with `process_group`."""
    call = HeadCall(
        hidden, weight, bias, True, 0.0, workspace_mib
    )  # as if with entropy: not frozen
    if strategy not in ("auto", "recompute", "stored"):
        raise ValueError(
            "token_logprobs: strategy must be auto, recompute or stored with process_group, "
            f"got {strategy!r}"
        )
    keep = KEEP[choose(strategy, call)]
    counted = targets != ignore_index
    local, mine = _local_targets(targets, counted, weight, group)
    logprobs: Tensor = _ShardedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, local, mine, counted, scales, keep, workspace_mib, group
    )
    return logprobs


def _local_targets(
    targets: Tensor, counted: Tensor, weight: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Rows of this rank's weight, 0 in the place of labels that other ranks have; and which labels
    this rank has."""
    sizes = _gathered(torch.tensor(len(weight), device=targets.device), group)
    rank, vocabulary = dist.get_rank(group), sizes.sum()
    inside = ((targets >= 0) & (targets < vocabulary)) | ~counted
    if targets.device.type != "cpu":
        torch._assert_async(inside.all(), "targets must be in [0, V) or ignore_index")
    elif not inside.all():
        wrong = targets[~inside][0].item()
        raise IndexError(
            f"token_logprobs: targets must be in [0, {int(vocabulary)}) or ignore_index, "
            f"got {wrong}"
        )
    row = targets.long() - sizes[:rank].sum()
    mine = counted & (row >= 0) & (row < len(weight))
    return torch.where(mine, row, 0).masked_fill(~counted, _IGNORED), mine


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, [ranks, ..] in their order."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def _merged(logprobs: Tensor, lse: Tensor, mine: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Log-probability and log sum exp over all shards, from those of this one, all float64.

    As in csrc/math/logsumexp.h: log p = -softplus(lse of the others - label), which keeps the
    digits of a probability next to 1.
    """
    surprise = -logprobs
    label = torch.where(mine, lse - surprise, 0)
    # log(e^x - 1), with x = -log p: the other entries of this shard over the label
    others = torch.where(mine, lse + torch.log(-torch.expm1(-surprise)), lse)
    parts = _gathered(torch.stack([others, label]), group)
    all_others, label = torch.logsumexp(parts[:, 0], 0), parts[:, 1].sum(0)
    tail = torch.logaddexp(torch.zeros_like(label), all_others - label)
    return -tail, label + tail


class _ShardedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        local: Tensor,
        mine: Tensor,
        counted: Tensor,
        scales: Scales,
        keep: str,
        workspace_mib: int,
        group: Any,
    ) -> Tensor:
        found, _, top, log_sum, kept = _OPS.token_logprobs(
            hidden, weight, local, bias, *scales, _IGNORED, False, workspace_mib, keep, 0.0
        )
        dtype, outer = found.dtype, scales.outer(found.dtype)
        # A shard may have no possible entry (a padded vocabulary); its softmax is NaN.
        own = found.double().masked_fill(log_sum == -torch.inf, -torch.inf)
        own_lse = outer * top.double() + log_sum.double()
        logprobs, lse = _merged(own, own_lse, mine, group)
        # -expm1 of this is minus the probability of entry 0, where that is not the label.
        share = torch.log1p(torch.exp(own + own_lse - lse))
        # Any number near the largest logit will do as `top`; what it is short of is in `log_sum`.
        top = (lse / outer).to(dtype)
        log_sum = (lse - outer * top.double()).to(dtype)
        states = [torch.where(mine, logprobs, share).to(dtype), top, log_sum]
        ctx.save_for_backward(hidden, weight, bias, local, *states, kept)
        ctx.arguments = scales, keep, workspace_mib, group
        return logprobs.masked_fill(~counted, 0).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, local, logprobs, top, log_sum, kept = ctx.saved_tensors
        scales, keep, workspace_mib, group = ctx.arguments
        needs = list(ctx.needs_input_grad[:3])
        grads = _OPS.token_logprobs_backward(
            grad, None, hidden, weight, local, bias, logprobs, logprobs.new_empty(0), top, log_sum,
            kept, *scales, _IGNORED, needs, workspace_mib, keep,
        )  # fmt: skip
        hidden_grad, *others = (g if need else None for g, need in zip(grads, needs, strict=True))
        if hidden_grad is not None:
            total = hidden_grad if hidden_grad.element_size() > 2 else hidden_grad.float()
            dist.all_reduce(total, group=group)
            hidden_grad = total.to(hidden.dtype)
        return hidden_grad, *others, *[None] * 7
