"""SPO in TRL's GRPOTrainer: `class SPOGRPOTrainer(SPOMixin, GRPOTrainer): pass`.

Generation, reward functions, vLLM, PEFT, logging and checkpoints stay TRL's; the loss, the
log-probabilities it is made of and the prompt values are ours. Written against TRL 1.16.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import spo_ext
from spo_ext.integrations.adapters import check_tasks
from spo_ext.integrations.agreement import check_agreement, rope_limit
from spo_ext.integrations.huggingface import add_token_logprobs, router_coefficient
from spo_ext.integrations.trl_parts import (
    MODEL_INPUTS,
    Objective,
    PromptValue,
    check_choices,
    check_settings,
    check_width,
    group_q0,
    left_padding,
    loss_mask,
    normalized,
    q0_column,
    rolled,
    sums_of,
)
from spo_ext.models import has_dropout

try:
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise ImportError(
        f"spo_ext.integrations.trl needs TRL ({error}). Install it: pip install 'trl>=1.16'"
    ) from error

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from spo_ext.stats import LossStats

    _Base: Any = GRPOTrainer
else:
    _Base = object

_OVERRIDDEN = (
    "_calculate_rewards",
    "_compute_loss",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
)


class SPOMixin(_Base):  # type: ignore[misc]
    """Put before GRPOTrainer, whose arguments it takes besides its own two.

    The loss of a completion is (Q_0 + beta R - r)^2, or its cross-entropy form, with R the sum of
    log pi - log pi_ref over the completion, beta that of GRPOConfig, r the sum of the rewards times
    `reward_weights`. TRL's advantages, clipping and `loss_type` are not used. A completion without
    a token that counts, or without a reward, has no loss. The sum is divided by the global number
    of the others in a generation batch, scaled to one accumulation window as TRL's "dapo" loss is.

    Q_0 must be known before TRL shuffles and splits the batch, so it is computed with the rewards,
    over the `num_generations` completions of a prompt gathered from all ranks, and stays the same
    until the next generation. With gain = r - beta R, R under the policy that has just generated:

    leave_one_out   mean gain of the prompt's other completions (its own, if it is alone: residual
                    0). It does not depend on the completion it is used for, so the gradient on
                    fresh samples is unbiased: -2 beta times that of E[r] - beta KL(pi | pi_ref).
    group           mean gain of all of them: the "group" objective of `spo_ext.loss`, with Q_0
                    held between generations. Residuals are (G - 1) / G of those of leave_one_out.
    importance      beta log mean exp(gain / beta): E_ref[exp(r / beta)] with samples of the
                    policy, weighted by exp(-R). A consistent estimate of the prompt value itself,
                    not only a baseline, and exact at the optimum, where all gains are equal; of
                    few samples it is too low.
    column          the dataset's column `q0`, in reward units, for instance `spo_ext.prompt_value`
                    of samples of the reference at the trainer's temperature, top-p and length.

    At the optimum of the KL-regularised objective every gain equals Q_0, so the first three agree
    there. The plain Monte-Carlo mean of exp(r / beta) over the group is not offered: it holds for
    samples of the reference, and after the first step these are not.

    Log-probabilities of policy and reference go through the same kernel, at the trainer's
    temperature, from last hidden states. All but `column` cost one forward pass per generation,
    unless TRL has made that pass already.

    Of GRPOConfig's other settings of the loss these have a meaning here:

    entropy_coef, use_adaptive_entropy  minus the coefficient times the mean entropy of the tokens
                    that get a gradient, as in TRL.
    top_entropy_quantile  R is of all tokens, but only those of high entropy get a gradient.
    off_policy_mask_threshold  a completion that the loss pushes down (Q_0 + beta R > r) and whose
                    mean log mu - log pi per token is above it has weight 0; mu is what vLLM
                    reported, or the policy that generated.
    multi_objective_aggregation="normalize_then_sum"  r is the weighted sum of each function's
                    rewards less their mean over the prompt's completions, divided by their
                    standard deviation; it is no reward in the sense of `column` or cross_entropy.
    router_aux_loss_coef  times the load-balancing loss of a mixture of experts, as in TRL.

    Args:
        objective: "squared", or "cross_entropy", which needs rewards <= 0 and a prompt value in the
            true sense: `column` or `importance`.
        prompt_value: how Q_0 comes about, above.

    Raises:
        ValueError: for beta 0, or settings that do not fit each other.
        RuntimeError: if this release of TRL lacks a method that is overridden here.
    """

    aux_loss_enabled: bool
    entropy_coef: float  # this and the next two are in TRL's checkpoints
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None

    def __init__(
        self,
        *args: Any,
        objective: Objective = "squared",
        prompt_value: PromptValue = "leave_one_out",
        **kwargs: Any,
    ) -> None:
        trainer = super()
        missing = [name for name in _OVERRIDDEN if not hasattr(trainer, name)]
        if missing:
            raise RuntimeError(
                f"SPOMixin: the class after it must be TRL's GRPOTrainer with {', '.join(missing)}"
            )
        check_choices(objective, prompt_value)
        super().__init__(*args, **kwargs)
        check_settings(self, prompt_value)
        self.spo_objective: Objective = objective
        self.spo_prompt_value: PromptValue = prompt_value
        self._gathered_rewards: Tensor | None = None
        policy = self._plain(self.model)
        check_tasks("SPOMixin", policy)
        self._rope_limit = rope_limit(policy.config)
        self._right_padded: dict[Any, bool] = {}
        for model in (self.model, self.ref_model):
            if model is not None:
                plain = self._plain(model)
                add_token_logprobs(plain, temperature=self.temperature)
                with self.accelerator.autocast():
                    way = check_agreement(plain, ("left", "padded"), owner="SPOMixin")
                self._right_padded[plain] = way == "padded"
        if self.aux_loss_enabled:
            given = self.args.router_aux_loss_coef
            self.aux_loss_enabled = router_coefficient("SPOMixin", policy, given) > 0
        if not self.args.disable_dropout and has_dropout(policy):
            logger.warning(
                "SPOMixin: the policy has dropout, and the reference has none, so that their "
                "log-ratio is not 0 at equal weights: set disable_dropout=True"
            )

    def _plain(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """As TRL, and keeps one reward [N] of each completion of all ranks, nan without any."""
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        parts = rewards
        if self.multi_objective_aggregation == "normalize_then_sum":
            parts = normalized(rewards, self._group_size())
        total = (parts * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._gathered_rewards = total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        return rewards

    def _group_size(self) -> int:
        size: int = self.num_generations if self.model.training else self.num_generations_eval
        return size

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As TRL, plus per completion spo_rewards, spo_q0 (float32) and spo_counted (bool) [B], and
        spo_num_sequences, a number. With B rows each, TRL shuffles and splits them like its own."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._gathered_rewards is not None
        rewards, size = self._gathered_rewards, len(inputs)
        counted = self.accelerator.gather(loss_mask(output).any(dim=1)) & ~rewards.isnan()
        mine = slice(
            self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size
        )
        if self.spo_prompt_value == "column":
            q0 = q0_column(inputs).to(rewards.device)
        else:
            q0 = self._estimate_q0(output, rewards, counted)[mine]
        output["spo_rewards"] = rewards[mine].masked_fill(~counted[mine], 0)
        output["spo_q0"] = q0
        output["spo_counted"] = counted[mine]
        output["spo_num_sequences"] = counted.sum()
        return output

    def _estimate_q0(self, output: dict[str, Any], rewards: Tensor, counted: Tensor) -> Tensor:
        """Q_0 of every completion of all ranks [N], 0 where it does not count."""
        log_ratios = self.accelerator.gather(self._log_ratios(output))
        prompts = torch.arange(len(rewards), device=rewards.device) // self._group_size()
        # Numbered anew, since a prompt may have no completion left.
        _, groups = torch.unique(prompts[counted], return_inverse=True)
        q0 = torch.zeros_like(rewards)
        q0[counted] = group_q0(
            rewards[counted], log_ratios[counted], groups, self.beta, self.spo_prompt_value
        )
        return q0

    @torch.no_grad()
    def _log_ratios(self, output: dict[str, Any]) -> Tensor:
        """R of this rank's completions [B], under the policy as it is now."""
        logprobs = output.get("old_per_token_logps")
        if logprobs is None:
            training = self.model.training
            size = getattr(self.args, f"per_device_{'train' if training else 'eval'}_batch_size")
            checkpointing = self.args.gradient_checkpointing_kwargs
            with disable_gradient_checkpointing(self.model, checkpointing):
                logprobs, *_ = self._score(self.model, output, batch_size=size)
        differences = (logprobs - output["ref_per_token_logps"]).double()
        sums: Tensor = (differences * loss_mask(output)).sum(dim=1)
        return sums.float()

    def _score(
        self, model: Any, batch: dict[str, Any], **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities of the completions' tokens [B, T]; entropies and the loss of a router
        if asked for."""
        found: tuple[Tensor, Tensor | None, Tensor | None] = (
            self._get_per_token_logps_and_entropies(
                model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].shape[1],
                **options,
                **{name: batch[name] for name in MODEL_INPUTS if name in batch},
            )
        )
        return found

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        *args: Any,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, also for the reference: it makes the model's inputs, images included, and what it
        asks of its fused head, `spo_ext.token_logprobs` answers. Padding is moved to the right for
        a model that is not right with padding on the left."""
        right = self._right_padded[self._plain(model)]

        def answer(*, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
            check_width(labels, self._rope_limit)
            shift = left_padding(inputs["attention_mask"]) if right else None
            if shift is not None:
                for name, value in inputs.items():
                    if isinstance(value, Tensor) and value.shape == labels.shape:
                        inputs[name] = rolled(value, shift)
                labels = rolled(labels, shift)
            found = model(**inputs, logprob_targets=labels, logprob_entropy=compute_entropy)
            parts = iter(found if isinstance(found, tuple) else (found,))
            per_token = [next(parts) for _ in range(1 + compute_entropy)]
            if shift is not None:  # what comes round belongs to padding, and is 0
                per_token = [rolled(part, -shift) for part in per_token]
            return SimpleNamespace(
                log_probs=per_token[0],
                entropy=per_token[1] if compute_entropy else None,
                aux_loss=next(parts) if compute_aux_loss else None,
            )

        found: tuple[Tensor, Tensor | None, Tensor | None] = (
            super()._get_per_token_logps_and_entropies(
                answer,
                *args,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **options,
            )
        )
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        logprobs, entropies, aux_loss = self._score(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        assert entropies is not None
        mask = loss_mask(inputs) & inputs["spo_counted"][:, None]
        taught = mask
        if self.top_entropy_quantile < 1:
            taught = self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        loss, stats = self._spo_loss(logprobs, mask, taught, inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self._entropy_bonus_enabled:
            policy_loss = self.accelerator.gather(loss.detach()).nanmean().item()
            metrics["policy_loss"].append(policy_loss)
            loss = loss - self._entropy_coefficient(entropies, taught) * (
                (entropies * taught).sum() / taught.sum().clamp(min=1) / steps
            )
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            metrics["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        log_ratio = (logprobs.detach() - inputs["ref_per_token_logps"]).masked_fill(~mask, 0)
        self._record(stats, mask, {"kl": (-log_ratio).expm1() + log_ratio, "entropy": entropies})
        return loss

    def _spo_loss(
        self, logprobs: Tensor, mask: Tensor, taught: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, LossStats]:
        """The loss of a micro-batch, as its part of the mean over the global sequences.

        mask, taught: bool [B, T], tokens that count in R, and those of them that get a gradient.
        """
        sequences = inputs["spo_num_sequences"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            # The generation batch lasts for steps_per_generation of these; DDP takes the mean over
            # ranks, and Trainer adds up a window as it is (loss_is_scaled_for_ga).
            windows = self.current_gradient_accumulation_steps / self.args.steps_per_generation
            sequences = sequences * windows
        ref_logprobs, rewards, q0 = (
            inputs[name] for name in ("ref_per_token_logps", "spo_rewards", "spo_q0")
        )
        weights = None
        if self.off_policy_mask_threshold is not None:
            log_ratio = (logprobs.detach() - ref_logprobs).masked_fill(~mask, 0).sum(1)
            written = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
            weights = self.get_off_policy_mask(
                (rewards - q0 - self.beta * log_ratio)[:, None],
                logprobs,
                logprobs.detach() if written is None else written,
                mask.float(),
                self.off_policy_mask_threshold,
            ).squeeze(1)
        if taught is not mask:
            logprobs = torch.where(taught, logprobs, logprobs.detach())
        found: tuple[Tensor, LossStats] = spo_ext.loss(
            logprobs, ref_logprobs, rewards, q0,
            beta=self.beta, objective=self.spo_objective, mask=mask, weights=weights,
            reduction="sum", denominator=sequences, return_stats=True,
        )  # fmt: skip
        return found

    def _entropy_coefficient(self, entropies: Tensor, mask: Tensor) -> float:
        """What the entropy bonus is multiplied by.

        With use_adaptive_entropy it is 0 as long as the mean entropy of the last step's tokens in
        `mask` was above entropy_target, and after each step the coefficient moves by
        entropy_coef_delta: up to that mean, down from it.
        """
        args = self.args
        coefficient = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > args.entropy_target:
            coefficient = 0.0
        if not self.model.training:
            return coefficient
        if self.use_adaptive_entropy:
            sums = torch.stack([(entropies * mask).sum(), mask.sum()]).detach()
            before = self._entropy_window_stats
            self._entropy_window_stats = sums if before is None else before + sums
        if self.accelerator.sync_gradients:
            if self.use_adaptive_entropy:
                sums = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
                total, count = sums.tolist()
                self._last_world_entropy = total / max(count, 1)
                self._entropy_window_stats = None
                rises = self._last_world_entropy <= args.entropy_target
                moved = self.entropy_coef + args.entropy_coef_delta * (1 if rises else -1)
                self.entropy_coef = min(max(moved, args.entropy_coef_min), args.entropy_coef_max)
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        return coefficient

    def _record(self, stats: LossStats, mask: Tensor, per_token: dict[str, Tensor]) -> None:
        """Means over the sequences and over the tokens of all ranks, into TRL's metrics."""
        sums = sums_of(stats, mask, per_token)
        stacked = torch.stack([part for pair in sums.values() for part in pair]).double()
        totals = self.accelerator.reduce(stacked, reduction="sum").view(-1, 2).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, (total, count) in zip(sums, totals, strict=True):
            metrics[name].append(total / max(count, 1))
