"""`SPOTrainer`: transformers.Trainer on batches of a trajectory store, with the SPO loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

import spo_ext
from spo_ext.integrations.huggingface import router_coefficient
from spo_ext.shown import hide_passwords
from spo_ext.store.checks import refuse
from spo_ext.trainer import checkpoints
from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.feed import MicroBatch
from spo_ext.trainer.health import Health
from spo_ext.trainer.metrics import Meter, add_loss, add_online, add_tokens
from spo_ext.trainer.model import base_model, completion_scores
from spo_ext.trainer.runlog import RunLog
from spo_ext.trainer.setup import Parts
from spo_ext.trainer.weights import online_baseline, sequence_weights

logger = logging.getLogger(__name__)

_OF_DATA = {
    "train_dataset",
    "eval_dataset",
    "data_collator",
    "compute_loss_func",
    "compute_metrics",
    "preprocess_logits_for_metrics",
}


class SPOTrainer(Trainer):
    """Learns from the trajectories of a store; online ones are rolled out on the way.

    Args:
        model: a causal language model of transformers, with PEFT's adapters or without. Its
            `forward` learns to answer log-probabilities (`spo_ext.trainer.model`).
        args: see `SPOConfig`.
        processing_class: the tokenizer; needed for rollouts in this process and for evaluation.
        ref_model: the reference; by default the model as it is now.
        reward: judges embedded rollouts and evaluations: a function of TRL's form,
            `f(completions, **kwargs)`, a `spo_ext.rollout.Reward`, a name, or a list of these,
            whose sum by args.reward_weights it is; by default args.reward. Functions get columns of
            the prompts by name.
        reward_funcs: TRL's name for reward.
        **options: of transformers.Trainer: callbacks, optimizers, ...; not those about data, which
            come from the store.

    Resuming (`train(resume_from_checkpoint=True)`) continues from the last checkpoint that was
    written to its end, with the batches that were drawn after it.

    With health_checks, what is logged is watched by `Health`: the main process warns, with advice,
    of collapse, explosion and drift, once per episode; `health/warnings` counts.

    Raises:
        ValueError: for settings that do not fit each other, the model or the store.
    """

    # The loss is divided by the sequences of the whole step, over all micro-batches and ranks.
    loss_is_scaled_for_ga = True
    args: SPOConfig

    def __init__(
        self,
        model: nn.Module,
        args: SPOConfig,
        processing_class: Any = None,
        *,
        ref_model: nn.Module | None = None,
        reward: Any = None,
        reward_funcs: Any = None,
        **options: Any,
    ) -> None:
        if reward is not None and reward_funcs is not None:
            refuse("SPOTrainer", "reward_funcs", "left out with reward, which it is", reward_funcs)
        reward = reward if reward_funcs is None else reward_funcs
        for name in _OF_DATA & {name for name, given in options.items() if given is not None}:
            refuse("SPOTrainer", name, "left out: data and loss are those of the store", name)
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            eval_dataset=[args.eval_split] if args.eval_strategy != "no" else None,
            **options,
        )
        self.meter = Meter()
        self._health = Health(args.beta, args.objective, args.reward_range)
        self._output = Path(str(args.output_dir))
        self._parts = Parts(self, ref_model, reward)
        self._router = router_coefficient("SPOConfig", model, args.router_aux_loss_coef)
        head = base_model(model).get_output_embeddings()
        trains = any(parameter.requires_grad for parameter in head.parameters())
        # A frozen head takes half the products, but not with the entropy (`spo_ext.explain`).
        self._log_entropy = trains if args.log_entropy is None else args.log_entropy
        self.add_callback(RunLog(args))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As transformers.Trainer's; True means the last complete checkpoint, if there is one."""
        resume = bool(resume_from_checkpoint)
        if isinstance(resume_from_checkpoint, bool):
            found = self._last_checkpoint() if resume else None
            resume_from_checkpoint = None if found is None else str(found)
        step = 0
        if resume_from_checkpoint is not None:
            state = checkpoints.read_state(Path(resume_from_checkpoint))
            step = int(state["global_step"])
            for name in ("run", "sync_every"):  # which number the policy's versions
                if getattr(self.args, name) != state[name]:
                    expected = f"{state[name]!r} as in the checkpoint"
                    refuse("SPOConfig", name, expected, getattr(self.args, name))
            if "health" in state:
                self._health.load_state_dict(state["health"])
        self._parts.start(step, resume)
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._parts.finish()
        return result

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Only counts micro-batches: the trajectories of a step come from the store when it
        starts."""
        count = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(range(count), batch_size=1)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The micro-batches of the step that starts now. See `Feed`."""
        for _ in range(num_batches):
            next(epoch_iterator)
        started = time.perf_counter()
        step = self.state.global_step
        self.meter.put(self._parts.before_step(step, self.model_wrapped))
        metrics, micro_batches = self._parts.next_step(step)
        self.meter.put(metrics)
        self.meter.put({"time/batch": time.perf_counter() - started})
        # input_ids are there for the Trainer, which counts them.
        ids = [one.tokens.model_inputs["input_ids"] for one in micro_batches]
        pairs = zip(micro_batches, ids, strict=True)
        return [{"micro_batch": one, "input_ids": read} for one, read in pairs], None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The SPO loss of a micro-batch, as its part of the mean over the step's sequences."""
        if return_outputs:
            raise ValueError("SPOTrainer: return_outputs must be False: there are no logits")
        batch: MicroBatch = inputs["micro_batch"]
        meter = self.meter if batch.share > 0 else Meter()
        logprobs, entropy, router_loss = completion_scores(
            model, batch.tokens, entropy=self._log_entropy, router=self._router > 0
        )
        device = logprobs.device
        rewards = batch.rewards.to(device)
        ref_logprobs, cu_seqlens = batch.ref_logprobs.to(device), batch.tokens.cu_seqlens.to(device)
        # DDP and FSDP2 average the gradients of the ranks.
        share = batch.share * self.accelerator.num_processes
        weights = sequence_weights(self.args, logprobs, rewards, batch)
        q0, options = batch.q0, self.args.loss_options()
        if self.args.online_baseline:
            q0 = online_baseline(self.args, logprobs, ref_logprobs, batch)
        loss, stats = spo_ext.loss(
            logprobs,
            ref_logprobs[None],  # per token, though there be as many sequences
            rewards,
            None if q0 is None else q0.to(device),
            cu_seqlens=cu_seqlens,
            groups=batch.groups.to(device) if options["objective"] == "group" else None,
            weights=weights,
            return_stats=True,
            **options,
        )
        if weights is not None:
            meter.add("spo/weight", weights)
        add_tokens(meter, logprobs, ref_logprobs, entropy)
        add_loss(meter, stats, rewards, batch.floor)
        add_online(meter, batch)
        scaled: Tensor = loss * share
        if router_loss is not None:
            meter.add("aux_loss", router_loss[None])
            counted = self._router if batch.share > 0 else 0.0
            scaled = scaled + counted * router_loss / self.current_gradient_accumulation_steps
        return scaled

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the interval over all ranks."""
        line = logs | self.meter.drain(self.accelerator) if "loss" in logs else logs
        if self.args.health_checks and "loss" in line:
            for found in self._health.check(line):
                if self.accelerator.is_main_process:
                    logger.warning("step %d: %s", self.state.global_step, found.message)
            line["health/warnings"] = float(self._health.count)
        super().log(line, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """pass@k of fresh samples for prompts of `args.eval_split`; the policy is not moved."""
        if eval_dataset is not None:
            expected = "None: prompts are those of eval_split"
            refuse("SPOTrainer", "eval_dataset", expected, eval_dataset)
        values = self._parts.evaluate()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def predict(self, *_arguments: Any, **_options: Any) -> NoReturn:
        """There are no labels and no logits to predict: `evaluate`, `spo eval` and `spo rollout`
        are what there is."""
        raise NotImplementedError("SPOTrainer: predict has no meaning here: use evaluate()")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """training_args.bin, too, is without the password of the database."""
        where, self.args.store = self.args.store, hide_passwords(str(self.args.store))
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.store = where

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Marks the checkpoint when all of it is on the disk, and only then drops older ones."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        folder = self._output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.begin(folder)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state = {name: getattr(self.args, name) for name in ("run", "sync_every")}
            state |= {"global_step": self.state.global_step, "health": self._health.state_dict()}
            checkpoints.mark_complete(folder, state)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(self._output), keep, best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _last_checkpoint(self) -> Path | None:
        if self.args.should_save:
            checkpoints.remove_torn(self._output)
        self.accelerator.wait_for_everyone()
        return checkpoints.last_complete(self._output)
