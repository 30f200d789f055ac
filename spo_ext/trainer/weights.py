"""How much each sequence of a micro-batch counts."""

from __future__ import annotations

import torch
from torch import Tensor

import spo_ext
from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.feed import MicroBatch


def sequence_weights(config: SPOConfig, logprobs: Tensor, batch: MicroBatch) -> Tensor | None:
    """[S] on the device of logprobs [N], without a gradient; None where all count alike.

    The product of two: `taper_weights` of failures that the policy has moved away from, where the
    behaviour is known, and (1 - the group's pass rate)^rarity.
    """
    rewards, weights = batch.rewards.to(logprobs.device), None
    if config.taper:
        cu_seqlens = batch.tokens.cu_seqlens.to(logprobs.device)
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
        _, groups = torch.unique(batch.groups.to(logprobs.device), return_inverse=True)
        passed = (rewards >= config.failure_below).float()
        rates = torch.zeros(len(passed), device=passed.device).scatter_reduce(
            0, groups, passed, "mean", include_self=False
        )
        rare = (1 - rates[groups]) ** config.rarity
        weights = rare if weights is None else weights * rare
    return weights
