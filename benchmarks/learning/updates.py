"""One optimiser step of each family of methods."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from spo_ext.trainer.model import completion_logprobs

from . import baselines
from .baselines import padded
from .feed import Rows
from .method import Method
from .objectives import SpoObjective, sums
from .settings import Config

_FINAL_RATE = 0.1  # share of the learning rate left at the end of the linear decay
_BETAS = (0.9, 0.98)
_LARGEST_WEIGHT = 5.0  # of a token of decoupled PPO


class Critic:
    """PPO's value network: a copy of the policy with a head of one number, and its optimiser."""

    def __init__(self, policy: Qwen2ForCausalLM, learning_rate: float) -> None:
        self._body = copy.deepcopy(policy.model).requires_grad_(True)
        self._head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self._head.weight)
        self._started = False
        self.parameters = [*self._body.parameters(), *self._head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=_BETAS, weight_decay=0.0
        )

    def values(self, rows: Rows) -> Tensor:
        """Of the state before each token, packed [N]."""
        if not self._started:  # so that the first advantages are not all of one sign
            nn.init.constant_(self._head.bias, float(rows.rewards[rows.online].mean()))
            self._started = True
        states = self._body(**rows.tokens.model_inputs, use_cache=False).last_hidden_state
        found: Tensor = self._head(states.flatten(0, 1)[rows.tokens.index]).squeeze(-1)
        return found


class Updater:
    """Optimiser steps of one method on one policy, which is trained in place.

    Args:
        steps: sampled batches in all; the learning rate warms up and decays over them.
        reference_rewards: see `SpoObjective`.
    """

    def __init__(
        self,
        method: Method,
        policy: Qwen2ForCausalLM,
        config: Config,
        steps: int,
        reference_rewards: Tensor | None,
    ) -> None:
        self._method, self._policy, self._config, self._steps = method, policy, config, steps
        self._optimizer = torch.optim.AdamW(
            policy.parameters(), lr=method.learning_rate, betas=_BETAS, weight_decay=0.0
        )
        self._spo = SpoObjective(method, reference_rewards) if method.family == "spo" else None
        self._critic: Critic | None = None
        if method.family == "ppo":
            self._critic = Critic(policy, method.value_learning_rate)
        self._seen: Rows | None = None
        self._targets: tuple[Tensor, Tensor] | None = None
        self._first: tuple[Rows, Tensor] | None = None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The policy's, and the value network's if there is one."""
        return [self._optimizer, *([self._critic.optimizer] if self._critic else [])]

    def update(self, rows: Rows, step: int) -> dict[str, float]:
        """steps count from 1. Returns what to log."""
        rate = self._method.learning_rate * self._schedule(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._critic is not None:
            for group in self._critic.optimizer.param_groups:
                group["lr"] = self._method.value_learning_rate * self._schedule(step)
        if self._spo is not None:
            self._spo.beta = self._method.beta_at(step / self._steps)
        logprobs, _ = completion_logprobs(self._policy, rows.tokens)
        losses = {
            "spo": self._spo_loss,
            "sft": self._likelihood,
            "expert": self._likelihood,
            "ppo": self._ppo_loss,
            "grpo": self._grpo_loss,
        }
        loss, values = losses[self._method.family](logprobs, rows)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        limit = self._config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), limit)
        self._optimizer.step()
        return {"loss": float(loss.detach()), "grad_norm": float(norm), **values}

    def _schedule(self, step: int) -> float:
        decay = 1 - (1 - _FINAL_RATE) * (step - 1) / self._steps
        return min(1.0, step / max(1, self._config.warmup_steps)) * decay

    def _spo_loss(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        assert self._spo is not None
        loss, stats, weights = self._spo.loss(logprobs, rows)
        values = {"mean_weight": float(weights.mean()), "log_ratio": float(stats.log_ratio.mean())}
        if stats.residual is not None:
            values["residual_rms"] = float(stats.residual.double().square().mean().sqrt())
        return loss, values

    def _likelihood(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        padded_logprobs, mask = padded(logprobs, rows.tokens.cu_seqlens)
        correct = (rows.rewards >= 0).to(logprobs)
        return baselines.likelihood_loss(padded_logprobs, mask, correct), {}

    def _ppo_loss(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        assert self._critic is not None
        cut = rows.tokens.cu_seqlens
        values, mask = padded(self._critic.values(rows), cut)
        sampled = mask * rows.online[:, None]
        if self._seen is not rows or self._targets is None:
            self._seen, self._targets = rows, self._ppo_targets(values.detach(), rows, mask)
        advantages, returns = self._targets
        self._critic.optimizer.zero_grad()
        baselines.value_loss(values, returns, sampled).backward()  # type: ignore[no-untyped-call]
        limit = self._config.max_grad_norm
        torch.nn.utils.clip_grad_norm_(self._critic.parameters, limit)
        self._critic.optimizer.step()
        return self._clipped(logprobs, rows, baselines.whitened(advantages, sampled))

    def _ppo_targets(self, values: Tensor, rows: Rows, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns of a batch, the same however often it is gone over."""
        cut = rows.tokens.cu_seqlens
        old, ref = padded(_known(rows), cut)[0], padded(rows.ref_logprobs, cut)[0]
        rewards = baselines.kl_rewards(old, ref, rows.rewards, mask, self._method.kl)
        return baselines.gae(rewards, values, mask, self._method.gae_lambda)

    def _grpo_loss(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        online = rows.online.to(rows.rewards)
        advantages = baselines.group_advantages(rows.rewards, rows.groups, online)
        loss, values = self._clipped(logprobs, rows, advantages[:, None])
        cut = rows.tokens.cu_seqlens
        new, mask = padded(logprobs, cut)
        old, ref = padded(_known(rows), cut)[0], padded(rows.ref_logprobs, cut)[0]
        penalty = baselines.kl_estimate(new, old, ref, mask * online[:, None])
        return loss + self._method.kl * penalty, values

    def _clipped(
        self, logprobs: Tensor, rows: Rows, advantages: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """PPO's surrogate on sampled rows, and the likelihood of offline ones."""
        cut = rows.tokens.cu_seqlens
        new, mask = padded(logprobs, cut)
        old = padded(_known(rows), cut)[0]
        sampled = mask * rows.online[:, None]
        if self._method.decoupled:
            before = self._before(new.detach(), rows)
            advantages = advantages * (before - old).exp().clamp(max=_LARGEST_WEIGHT)
            old = before
        loss = baselines.clipped_loss(new, old, advantages, sampled, self._method.clip)
        if self._method.offline_weight:
            offline = (~rows.online & (rows.rewards >= 0)).to(logprobs)
            likelihood = baselines.likelihood_loss(new, mask, offline)
            loss = loss + self._method.offline_weight * likelihood
        ratio = (new - old).detach().exp()
        beyond = ((ratio - 1).abs() > self._method.clip).to(mask)
        values: dict[str, Any] = {
            "clipped": float(baselines.masked_mean(beyond, sampled)),
            "log_ratio": float(sums(logprobs.detach() - rows.ref_logprobs, cut).mean()),
        }
        return loss, values

    def _before(self, logprobs: Tensor, rows: Rows) -> Tensor:
        """Those of the policy as it was when it first saw the batch."""
        if self._first is None or self._first[0] is not rows:
            self._first = (rows, logprobs)
        return self._first[1]


def _known(rows: Rows) -> Tensor:
    """Behaviour log-probabilities, those of the reference for rows that the loss leaves out."""
    return torch.where(rows.behaviour_logprobs.isnan(), rows.ref_logprobs, rows.behaviour_logprobs)
