"""One optimiser step of each family of methods."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from spo_ext.trainer.model import completion_logprobs

from . import baselines
from .baselines import padded
from .controls import BETAS, Critic, grpo_loss, known, likelihood_loss, surrogate
from .feed import Rows
from .method import Method
from .objectives import SpoObjective
from .settings import Config

_FINAL_RATE = 0.1  # share of the learning rate left at the end of the linear decay
_LARGEST_WEIGHT = 5.0  # of a token of decoupled PPO


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
            policy.parameters(), lr=method.learning_rate, betas=BETAS, weight_decay=0.0
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
        return likelihood_loss(logprobs, rows, success=0.0), {}

    def _ppo_loss(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        assert self._critic is not None
        method = self._method
        values, mask = padded(self._critic.values(rows), rows.tokens.cu_seqlens)
        sampled = mask * rows.online[:, None]
        if self._seen is not rows or self._targets is None:  # the same in every epoch
            self._seen = rows
            self._targets = self._critic.targets(
                values.detach(), rows, method.kl, method.gae_lambda
            )
        advantages, returns = self._targets
        self._critic.step(values, returns, sampled, self._config.max_grad_norm)
        return self._clipped(logprobs, rows, baselines.whitened(advantages, sampled))

    def _grpo_loss(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        loss, values = grpo_loss(logprobs, rows, self._method.clip, self._method.kl)
        return loss + self._offline_loss(logprobs, rows), values

    def _clipped(
        self, logprobs: Tensor, rows: Rows, advantages: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """PPO's surrogate on sampled rows, and the likelihood of offline ones."""
        before = None
        if self._method.decoupled:
            before = self._before(logprobs.detach(), rows)
            ratio = (before - known(rows)).exp().clamp(max=_LARGEST_WEIGHT)
            advantages = advantages * padded(ratio, rows.tokens.cu_seqlens)[0]
        loss, values = surrogate(logprobs, rows, advantages, self._method.clip, before)
        return loss + self._offline_loss(logprobs, rows), values

    def _offline_loss(self, logprobs: Tensor, rows: Rows) -> Tensor | float:
        if not self._method.offline_weight:
            return 0.0
        cut = rows.tokens.cu_seqlens
        offline = (~rows.online & (rows.rewards >= 0)).to(logprobs)
        return self._method.offline_weight * baselines.likelihood_loss(
            *padded(logprobs, cut), offline
        )

    def _before(self, logprobs: Tensor, rows: Rows) -> Tensor:
        """Those of the policy as it was when it first saw the batch, [N]."""
        if self._first is None or self._first[0] is not rows:
            self._first = (rows, logprobs)
        return self._first[1]
