"""The controls as trainers: SFT, expert iteration, GRPO, and PPO with a value network.

Each takes its batches, rollouts and reference from `SPOTrainer` and brings a loss of its own. The
losses are functions of a batch, so that tests hold them against TRL's and verl's. They are means
over the whole step: one micro-batch on one process.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from spo_ext.trainer import SPOTrainer
from spo_ext.trainer.batches import TokenBatch
from spo_ext.trainer.metrics import add_online
from spo_ext.trainer.model import completion_logprobs

from . import baselines
from .baselines import padded

BETAS = (0.9, 0.98)
Values = dict[str, float]


class Rows(Protocol):
    """S trajectories, as `spo_ext.trainer.feed.MicroBatch` has them."""

    @property
    def tokens(self) -> TokenBatch: ...
    @property
    def cu_seqlens(self) -> Tensor: ...
    @property
    def ref_logprobs(self) -> Tensor: ...
    @property
    def behaviour_logprobs(self) -> Tensor: ...
    @property
    def rewards(self) -> Tensor: ...
    @property
    def groups(self) -> Tensor: ...
    @property
    def online(self) -> Tensor: ...


def likelihood_loss(logprobs: Tensor, rows: Rows, success: float) -> Tensor:
    """Of the programs with this reward or more, the mean over their tokens."""
    found, mask = padded(logprobs, rows.cu_seqlens)
    return baselines.likelihood_loss(found, mask, (rows.rewards >= success).to(logprobs))


def surrogate(
    logprobs: Tensor, rows: Rows, advantages: Tensor, clip: float
) -> tuple[Tensor, Values]:
    """PPO's clipped loss on the rows that the policy sampled, and what to log.

    advantages: [S, T] or [S, 1]. Ratios are to the policy that wrote the rows.
    """
    cut = rows.cu_seqlens
    new, mask = padded(logprobs, cut)
    old = padded(known(rows), cut)[0]
    sampled = mask * rows.online[:, None]
    loss = baselines.clipped_loss(new, old, advantages, sampled, clip)
    beyond = (((new - old).detach().exp() - 1).abs() > clip).to(mask)
    log_ratios = padded(logprobs.detach() - rows.ref_logprobs, cut)[0].sum(1)
    clipped = float(baselines.masked_mean(beyond, sampled))
    return loss, {"clipped": clipped, "log_ratio": float(log_ratios.mean())}


def grpo_loss(logprobs: Tensor, rows: Rows, clip: float, kl: float) -> tuple[Tensor, Values]:
    """GRPO's, with its penalty, and what to log."""
    cut = rows.cu_seqlens
    loss, values = surrogate(logprobs, rows, group_advantages(rows), clip)
    new, mask = padded(logprobs, cut)
    old, ref = padded(known(rows), cut)[0], padded(rows.ref_logprobs, cut)[0]
    penalty = baselines.kl_estimate(new, old, ref, mask * rows.online[:, None])
    return loss + kl * penalty, values


def truncated_grpo_loss(
    logprobs: Tensor, rows: Rows, kl: float, cap: float
) -> tuple[Tensor, Values]:
    """GRPO's with its old policy the one that learns, and what to log.

    As TRL corrects for a sampler that is another policy: the loss of a token has the weight
    min(pi / behaviour, cap), the penalty none.
    """
    cut = rows.cu_seqlens
    new, mask = padded(logprobs, cut)
    behaviour, ref = padded(known(rows), cut)[0], padded(rows.ref_logprobs, cut)[0]
    old, sampled = new.detach(), mask * rows.online[:, None]
    weights = (old - behaviour).exp().clamp(max=cap)
    loss = baselines.clipped_loss(new, old, group_advantages(rows) * weights, sampled, math.inf)
    log_ratios = padded(logprobs.detach() - rows.ref_logprobs, cut)[0].sum(1)
    values = {"log_ratio": float(log_ratios.mean())}
    return loss + kl * baselines.kl_estimate(new, old, ref, sampled), values


def group_advantages(rows: Rows) -> Tensor:
    """[S, 1]; 0 for rows that the policy did not sample."""
    online = rows.online.to(rows.rewards)
    return baselines.group_advantages(rows.rewards, rows.groups, online)[:, None]


def ppo_loss(
    logprobs: Tensor,
    rows: Rows,
    critic: Critic,
    *,
    clip: float,
    kl: float,
    gae_lambda: float,
    max_grad_norm: float,
) -> tuple[Tensor, Values]:
    """PPO's by the values of the critic, which takes its own step on the way; and what to log."""
    values, mask = padded(critic.values(rows), rows.cu_seqlens)
    sampled = mask * rows.online[:, None]
    advantages, returns = critic.targets(values.detach(), rows, kl, gae_lambda)
    critic.step(values, returns, sampled, max_grad_norm)
    return surrogate(logprobs, rows, baselines.whitened(advantages, sampled), clip)


def known(rows: Rows) -> Tensor:
    """Behaviour log-probabilities, those of the reference for rows that the loss leaves out."""
    return torch.where(rows.behaviour_logprobs.isnan(), rows.ref_logprobs, rows.behaviour_logprobs)


class Critic:
    """PPO's value network: a copy of the policy with a head of one number, and its optimiser."""

    def __init__(self, policy: Qwen2ForCausalLM, learning_rate: float) -> None:
        self._body = copy.deepcopy(policy.model).requires_grad_(True)
        self._head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self._head.weight)
        self._started = False
        self.parameters = [*self._body.parameters(), *self._head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0
        )

    def values(self, rows: Rows) -> Tensor:
        """Of the state before each token, packed [N]. It begins as the mean reward of its rows."""
        if not self._started:
            # Adam would take a hundred steps to get there, on which advantages are all of one sign
            nn.init.constant_(self._head.bias, float(rows.rewards[rows.online].mean()))
            self._started = True
        inputs = rows.tokens.inputs_on(self._head.weight.device)
        states = self._body(**inputs, use_cache=False).last_hidden_state
        found: Tensor = self._head(states.flatten(0, 1)[rows.tokens.index]).squeeze(-1)
        return found

    def targets(
        self, values: Tensor, rows: Rows, kl: float, gae_lambda: float
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns [S, T]; values: [S, T], without a gradient."""
        cut = rows.cu_seqlens
        old, mask = padded(known(rows), cut)
        ref = padded(rows.ref_logprobs, cut)[0]
        rewards = baselines.kl_rewards(old, ref, rows.rewards, mask, kl)
        return baselines.gae(rewards, values, mask, gae_lambda)

    def step(self, values: Tensor, returns: Tensor, mask: Tensor, max_grad_norm: float) -> None:
        """One step towards the returns; values: [S, T] with their gradient."""
        self.optimizer.zero_grad()
        baselines.value_loss(values, returns, mask).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self.optimizer.step()


class Control(SPOTrainer):
    """A trainer with another loss, which a subclass gives by `loss_of`."""

    kl, clip, gae_lambda, value_learning_rate = 0.05, 0.2, 1.0, 1e-3

    def loss_of(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, Values]:
        """The loss of a step's rows, from the policy's log-probabilities [N]; and what to log."""
        raise NotImplementedError

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """See `loss_of`."""
        batch = inputs["micro_batch"]
        logprobs, _entropy = completion_logprobs(model, batch.tokens)
        loss, values = self.loss_of(logprobs, batch)
        add_online(self.meter, batch)
        self.meter.put(values)
        return loss


class SFT(Control):
    """Likelihood of the correct programs of a batch: of solutions, or, for expert iteration, of
    those that the policy wrote itself."""

    def _prompt_values(self) -> None:
        """Nothing is compared with the value of a prompt."""

    def loss_of(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, Values]:
        return likelihood_loss(logprobs, rows, self.args.failure_below), {}


class GRPO(Control):
    """Clipped ratios, rewards normalised in the group, kl in the loss."""

    def loss_of(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, Values]:
        return grpo_loss(logprobs, rows, self.clip, self.kl)


class TruncatedGRPO(Control):
    """GRPO with truncated importance weights (TIS), for a sampler that lags behind."""

    cap = 2.0

    def loss_of(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, Values]:
        return truncated_grpo_loss(logprobs, rows, self.kl, self.cap)


class PPO(Control):
    """Clipped ratios, a value network of its own, kl in the reward."""

    def __init__(self, model: nn.Module, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        self.critic = Critic(model, self.value_learning_rate)  # type: ignore[arg-type]

    def loss_of(self, logprobs: Tensor, rows: Rows) -> tuple[Tensor, Values]:
        assert self.lr_scheduler is not None
        share = self.lr_scheduler.get_last_lr()[0] / self.args.learning_rate
        for group in self.critic.optimizer.param_groups:
            group["lr"] = self.value_learning_rate * share
        return ppo_loss(
            logprobs,
            rows,
            self.critic,
            clip=self.clip,
            kl=self.kl,
            gae_lambda=self.gae_lambda,
            max_grad_norm=self.args.max_grad_norm,
        )
