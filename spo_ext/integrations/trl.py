"""SPO in TRL's GRPOTrainer: `class SPOGRPOTrainer(SPOMixin, GRPOTrainer): pass`.

Generation, reward functions, vLLM, PEFT, logging and checkpoints stay TRL's; the loss, the
log-probabilities it is made of and the prompt values are ours. Written against TRL 1.16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import spo_ext
from spo_ext.integrations.huggingface import add_token_logprobs
from spo_ext.integrations.trl_parts import (
    MODEL_INPUTS,
    Objective,
    PromptValue,
    check_choices,
    check_settings,
    group_q0,
    loss_mask,
    q0_column,
    sums_of,
)

try:
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise ImportError(
        f"spo_ext.integrations.trl needs TRL ({error}). Install it: pip install 'trl>=1.16'"
    ) from error

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
    temperature, from last hidden states; with images TRL computes both. All but `column` cost one
    forward pass per generation, unless TRL has made that pass already.

    Args:
        objective: "squared", or "cross_entropy", which needs rewards <= 0 and a prompt value in the
            true sense: `column` or `importance`.
        prompt_value: how Q_0 comes about, above.

    Raises:
        ValueError: for beta 0, or a setting of GRPOConfig that this loss would ignore.
        RuntimeError: if this release of TRL lacks a method that is overridden here.
    """

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
        check_settings(self)
        self.spo_objective: Objective = objective
        self.spo_prompt_value: PromptValue = prompt_value
        self._gathered_rewards: Tensor | None = None
        for model in (self.model, self.ref_model):
            if model is not None:
                add_token_logprobs(
                    self.accelerator.unwrap_model(model), temperature=self.temperature
                )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """As TRL, and keeps the weighted sums [N] of all ranks, nan where no function gave one."""
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._gathered_rewards = total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        return rewards

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
        size = self.num_generations if self.model.training else self.num_generations_eval
        prompts = torch.arange(len(rewards), device=rewards.device) // size
        # Numbered anew, since a prompt may have no completion left.
        groups = prompts[counted].unique(return_inverse=True)[1]
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
                logprobs, _ = self._score(self.model, output, batch_size=size)
        differences = (logprobs - output["ref_per_token_logps"]).double()
        sums: Tensor = (differences * loss_mask(output)).sum(dim=1)
        return sums.float()

    def _score(self, model: Any, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Any]:
        """Log-probabilities of the completions' tokens [B, T], and entropies if asked for."""
        logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            **options,
            **{name: batch[name] for name in MODEL_INPUTS if name in batch},
        )
        return logprobs, entropies

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **other: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, also for the reference, through `spo_ext.token_logprobs`."""
        if any(value is not None and value is not False for value in other.values()):
            return super()._get_per_token_logps_and_entropies(  # type: ignore[no-any-return]
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy,
                **other,
            )  # fmt: skip
        targets = input_ids.masked_fill(attention_mask == 0, -100)
        targets[:, :-logits_to_keep] = -100
        parts = []
        step = batch_size or max(len(input_ids), 1)
        for start in range(0, len(input_ids), step):
            part = slice(start, start + step)
            with self.accelerator.autocast():
                scores = model(
                    input_ids=input_ids[part],
                    attention_mask=attention_mask[part],
                    logprob_targets=targets[part],
                    logprob_entropy=compute_entropy,
                )
            parts.append(scores if compute_entropy else (scores,))
        columns = [torch.cat(part)[:, -logits_to_keep:] for part in zip(*parts, strict=True)]
        return columns[0], columns[1] if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        logprobs, entropies = self._score(model, inputs, compute_entropy=True)
        mask = loss_mask(inputs) & inputs["spo_counted"][:, None]
        ref_logprobs = inputs["ref_per_token_logps"]
        sequences = inputs["spo_num_sequences"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            # The generation batch lasts for steps_per_generation of these; DDP takes the mean over
            # ranks, and Trainer adds up a window as it is (loss_is_scaled_for_ga).
            windows = self.current_gradient_accumulation_steps / self.args.steps_per_generation
            sequences = sequences * windows
        loss, stats = spo_ext.loss(
            logprobs, ref_logprobs, inputs["spo_rewards"], inputs["spo_q0"],
            beta=self.beta, objective=self.spo_objective, mask=mask, reduction="sum",
            denominator=sequences, return_stats=True,
        )  # fmt: skip
        log_ratio = (logprobs.detach() - ref_logprobs).masked_fill(~mask, 0)
        self._record(stats, mask, {"kl": (-log_ratio).expm1() + log_ratio, "entropy": entropies})
        return loss

    def _record(self, stats: LossStats, mask: Tensor, per_token: dict[str, Tensor]) -> None:
        """Means over the sequences and over the tokens of all ranks, into TRL's metrics."""
        sums = sums_of(stats, mask, per_token)
        stacked = torch.stack([part for pair in sums.values() for part in pair]).double()
        totals = self.accelerator.reduce(stacked, reduction="sum").view(-1, 2).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, (total, count) in zip(sums, totals, strict=True):
            metrics[name].append(total / max(count, 1))
