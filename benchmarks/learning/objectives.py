"""The SPO loss of a method: which prompt value, which weights, which objective."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
from torch import Tensor

import spo_ext
from spo_ext.stats import LossStats

from .feed import Rows
from .method import Method

_DECAY = 0.5  # of a running prompt value, which is seen once in some forty batches
_SMOOTHING = 0.5
_REWARD_RANGE = (-1.0, 0.0)


class SpoObjective:
    """Keeps the prompt values of all training problems between updates. beta may be changed.

    Args:
        reference_rewards: [problems, n] of the reference's samples, None for a method that
            estimates Q_0 from its own batches.
    """

    def __init__(self, method: Method, reference_rewards: Tensor | None) -> None:
        self._method = method
        self.beta = method.beta
        self._values: Tensor | None = None
        if reference_rewards is not None:
            self._values = spo_ext.prompt_value(
                reference_rewards,
                beta=method.beta if method.value_beta is None else method.value_beta,
                smoothing=0.0 if method.baseline == "reference" else _SMOOTHING,
                reward_range=None if method.baseline == "reference" else _REWARD_RANGE,
            )

    def loss(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, LossStats, Tensor]:
        """The loss, scaled so that one learning rate serves every beta; and the weights [S]."""
        method = self._method
        cu_seqlens = rows.tokens.cu_seqlens
        log_ratios = sums(logprobs.detach() - rows.ref_logprobs, cu_seqlens)
        weights = self._weights(sums(logprobs.detach(), cu_seqlens), rows)
        # With a mean over other rows than its own, the group's objective is the squared one.
        other_mean = method.baseline in ("online_group", "natural", "distinct")
        own_mean = method.objective == "group" and not other_mean
        objective = "squared" if method.objective == "group" and not own_mean else method.objective
        weighted_loss = partial(
            spo_ext.loss,
            logprobs,
            rows.ref_logprobs
            if objective == "advantage"
            else sums(rows.ref_logprobs, cu_seqlens)[:, None],
            rows.rewards,
            None if own_mean else self._prompt_values(log_ratios, rows),
            beta=self.beta,
            objective=objective,
            groups=rows.groups if own_mean else None,
            leave_one_out=own_mean and method.baseline == "leave_one_out",
            cu_seqlens=cu_seqlens,
            return_stats=True,
        )
        if method.straight_from is not None:
            with torch.no_grad():
                residual = weighted_loss()[1].residual
            weights = weights * (method.straight_from / residual.abs()).clamp(max=1)
        loss, stats = weighted_loss(weights=weights)
        return loss * self._scale(), stats, weights

    def _scale(self) -> float:
        """d/dR of (Q_T - r)^2 is 2 beta (Q_T - r): without the factor 2 beta the step is the same
        for every beta. cross_entropy, a function of Q_T / beta, has no such factor."""
        return 1.0 if self._method.objective == "cross_entropy" else 1.0 / (2.0 * self.beta)

    def _prompt_values(self, log_ratios: Tensor, rows: Rows) -> Tensor:
        """Q_0 [S] of each row's problem."""
        method = self._method
        if method.baseline in ("reference", "smoothed"):
            assert self._values is not None
            return self._values[rows.groups]
        _, groups = torch.unique(rows.groups, return_inverse=True)
        if method.baseline == "leave_one_out":
            return spo_ext.prompt_value(
                rows.rewards,
                beta=self.beta,
                groups=groups,
                estimator="leave_one_out",
                log_ratios=log_ratios,
            )
        if method.baseline == "running":
            assert self._values is not None
            self._values = spo_ext.prompt_value(
                rows.rewards,
                beta=self.beta,
                groups=rows.groups,
                num_prompts=len(self._values),
                estimator="ema",
                log_ratios=log_ratios,
                previous=self._values,
                decay=_DECAY,
            )
            return self._values[rows.groups]
        if method.baseline in ("natural", "distinct"):
            shares = rows.shares
            if method.baseline == "distinct":
                once = 1 / copies(rows)
                shares = once / group_sums(once, groups)
            assert shares is not None
            return group_sums(shares * (rows.rewards - self.beta * log_ratios), groups)
        keep = rows.online if method.baseline == "online_group" else torch.ones_like(rows.online)
        values = spo_ext.prompt_value(
            rows.rewards[keep],
            beta=self.beta,
            groups=groups[keep],
            num_prompts=int(groups.max()) + 1,
            estimator="group",
            log_ratios=log_ratios[keep],
        )
        return values[groups]

    def _weights(self, logprob_sums: Tensor, rows: Rows) -> Tensor:
        weights = torch.ones_like(rows.rewards)
        if self._method.taper:
            behaviour = sums(rows.behaviour_logprobs, rows.tokens.cu_seqlens)
            weights = spo_ext.taper_weights(
                logprob_sums,
                torch.where(behaviour.isnan(), logprob_sums, behaviour),
                rows.rewards,
                threshold=0.0,  # rewards are 0 and -1
            )
        if self._method.baseline == "distinct":
            weights = weights / copies(rows)
        if self._method.rare_power:
            weights = weights * (1 - pass_rates(rows)) ** self._method.rare_power
        if self._method.per_token:
            lengths = rows.tokens.cu_seqlens.diff().to(weights)
            weights = weights * lengths.mean() / lengths
        return weights


def copies(rows: Rows) -> Tensor:
    """[S]: how many rows of its problem in the batch are the same program as this one."""
    sizes = rows.tokens.cu_seqlens.diff().tolist()
    programs = [tuple(part.tolist()) for part in torch.split(rows.tokens.targets, sizes)]
    keys = list(zip(rows.groups.tolist(), programs, strict=True))
    counts = Counter(keys)
    return torch.tensor([counts[key] for key in keys]).to(rows.rewards)


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """[S]: for each row the sum of the values [S] of its group; groups count from 0."""
    return values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)[groups]


def pass_rates(rows: Rows) -> Tensor:
    """Of the sampled rows of each row's group, [S]; 0 for a group without any."""
    online = rows.online.to(rows.rewards)
    passed = group_sums(online * (rows.rewards >= 0), rows.groups)
    return passed / group_sums(online, rows.groups).clamp(min=1)


def sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of packed values [N] over each program, [S], added up in double."""
    ends = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    # nan would spread to all later programs through a running sum.
    if not bool(values.isnan().any()):
        return ends[cu_seqlens].diff().to(values.dtype)
    parts = torch.split(values, cu_seqlens.diff().tolist())
    return torch.stack([part.double().sum() for part in parts]).to(values.dtype)
