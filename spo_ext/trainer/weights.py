"""How much each sequence of a micro-batch counts."""

from __future__ import annotations

import torch
from torch import Tensor

import spo_ext
from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.feed import MicroBatch


def sequence_weights(
    config: SPOConfig, logprobs: Tensor, rewards: Tensor, cu_seqlens: Tensor, batch: MicroBatch
) -> Tensor | None:
    """[S] on the device of logprobs [N], without a gradient; None where all count alike.

    The product of two: `taper_weights` of failures that the policy has moved away from, where the
    behaviour is known, and (1 - the group's pass rate)^rarity. rewards [S] and cu_seqlens [S + 1]
    are those of the batch, on that device.
    """
    weights = None
    if config.taper:
        ends = torch.cat([logprobs.new_zeros(1), logprobs.detach().double().cumsum(0)])
        sums = ends[cu_seqlens].diff()
        behaviour = batch.behaviour_sums.to(sums)
        weights = spo_ext.taper_weights(
            sums,
            torch.where(behaviour.isnan(), sums, behaviour),
            rewards,
            threshold=config.failure_below,
        )
    if config.rarity:
        rare = _rarity(config, batch).to(logprobs.device)
        weights = rare if weights is None else weights * rare
    return weights


def _rarity(config: SPOConfig, batch: MicroBatch) -> Tensor:
    """On the CPU, where the batch is: to number groups on a device would wait for it."""
    _, groups = torch.unique(batch.groups, return_inverse=True)
    passed = (batch.rewards >= config.failure_below).float()
    rates = torch.zeros(len(passed)).scatter_reduce(0, groups, passed, "mean", include_self=False)
    return (1 - rates[groups]) ** config.rarity
