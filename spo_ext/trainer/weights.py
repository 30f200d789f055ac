"""What a sequence of a micro-batch is compared with in its group, and how much it counts."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import spo_ext
from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.feed import MicroBatch


def group_baseline(
    config: SPOConfig, logprobs: Tensor, ref_logprobs: Tensor, batch: MicroBatch
) -> Tensor:
    """Q_0 [S]: a mean of r - beta R over the rows of a group, without gradient.

    Of a mixed group the online rows alone are counted: what others wrote says nothing of how often
    the policy succeeds. One whose online rows were all too long has the mean over its other rows.

    With importance_sampling_baseline a row counts min(1, pi / behaviour), where that is known: the
    mean is then an estimate for the policy that learns. Without, failures that it has long moved
    away from, with their large -beta R, ask that all other rows become less likely.
    """
    groups, counted = _counted(batch)
    gain = (batch.rewards.double() + batch.paid).to(logprobs.device)
    gain = gain - config.beta * _sums(logprobs - ref_logprobs, batch)
    # Not by `spo_ext.prompt_value`: it waits for the device, and adds by index_add, in any order on
    # a GPU. A product has one order.
    together = groups[:, None] == groups
    if config.mixed_groups:
        together &= counted
    logs = torch.zeros_like(gain)
    if config.importance_sampling_baseline:
        logs = _sums(_log_ratios(logprobs, batch), batch).clamp(max=0.0)
    means = logs.where(together.to(logs.device), -torch.inf).softmax(1)
    return (means @ gain).float()


def _log_ratios(logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """log pi - log behaviour of each token [N], without gradient; 0 where it is not known."""
    behaviour = batch.behaviour_logprobs.to(logprobs)
    return torch.where(behaviour.isnan(), 0.0, logprobs.detach() - behaviour)


def soft_baseline(config: SPOConfig, batch: MicroBatch) -> Tensor:
    """Q_0 [S]: b log mean exp(return / b) over each group, with softness b = q0_beta.

    With the squared loss and reference behaviour that is OAPL (arXiv 2602.19362, whose beta_1 is b
    and beta_2 beta): SPO's regression, where the reference is the policy that sampled.
    """
    _, groups = torch.unique(batch.groups, return_inverse=True)
    beta = config.beta if config.q0_beta is None else config.q0_beta
    returns = (batch.rewards.double() + batch.paid).float()
    with warnings.catch_warnings():  # of a group that failed whole, whose value is the floor here
        warnings.simplefilter("ignore", UserWarning)
        return spo_ext.prompt_value(returns, groups=groups, beta=beta)[groups]


def importance_sampled(
    config: SPOConfig, logprobs: Tensor, batch: MicroBatch, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [N] and weights [S], corrected by w = pi / behaviour, without a gradient.

    A token's weight scales its gradient and leaves its value; a sequence's is the product over its
    tokens. truncate: min(w, cap). mask: w, or 0 if it is larger than the cap. Where the behaviour
    is not known the weight is 1.
    """
    mode, cap = config.importance_sampling_mode, config.importance_sampling_cap
    if mode == "none":
        return logprobs, weights
    logs = _log_ratios(logprobs, batch)
    if mode.startswith("sequence"):
        logs = _sums(logs, batch).float()
    ratios = logs.exp()
    beyond = cap if mode.endswith("truncate") else 0.0
    counted = ratios.where(ratios <= cap, beyond)
    if mode.startswith("sequence"):
        return logprobs, counted if weights is None else weights * counted
    value = logprobs.detach()
    return value + counted * (logprobs - value), weights


def sequence_weights(
    config: SPOConfig, logprobs: Tensor, rewards: Tensor, batch: MicroBatch
) -> Tensor | None:
    """[S] on the device of logprobs [N], without a gradient; None where all count alike.

    The product of two: `taper_weights` of failures that the policy has moved away from, where the
    behaviour is known, and (1 - the group's pass rate)^rarity, in a mixed group that of its online
    rows. rewards [S] are those of the batch, on that device.
    """
    weights = None
    if config.taper:
        sums = _sums(logprobs, batch)
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
    groups, counted = _counted(batch)
    passed = (batch.rewards >= config.failure_below).float()
    rates = torch.zeros(len(passed)).scatter_reduce(
        0, groups[counted], passed[counted], "mean", include_self=False
    )
    return (1 - rates[groups]) ** config.rarity


def _counted(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Groups [S] numbered from 0; and bool [S]: online rows, or all of a group without any.

    On the CPU, where the batch is: to number groups on a device would wait for it.
    """
    _, groups = torch.unique(batch.groups, return_inverse=True)
    some = torch.zeros(len(groups), dtype=torch.bool)
    some[groups[batch.online]] = True
    return groups, batch.online | ~some[groups]


def _sums(values: Tensor, batch: MicroBatch) -> Tensor:
    """Of per-token values [N] over each sequence, [S], float64, without a gradient."""
    ends = torch.cat([values.new_zeros(1), values.detach().double().cumsum(0)])
    return ends[batch.cu_seqlens.to(values.device)].diff()
