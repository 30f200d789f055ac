"""`SPOTrainer`: transformers.Trainer on batches of a trajectory store, with the SPO loss."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

import spo_ext
from spo_ext.checks import refuse
from spo_ext.data.tokens import decoded
from spo_ext.evaluation.evaluate import evaluate
from spo_ext.integrations.adapters import check_tasks
from spo_ext.integrations.agreement import rope_limit
from spo_ext.integrations.huggingface import router_coefficient
from spo_ext.rollout import Generator, Reward, Sampling
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.rollout.rewards import as_reward, judged_by
from spo_ext.rollout.rollouts import Rollouts
from spo_ext.rollout.values import PromptValues, estimate_q0
from spo_ext.shown import hide_passwords
from spo_ext.store import StoredPrompt, TrajectoryStore
from spo_ext.trainer import checkpoints
from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.feed import Feed, MicroBatch
from spo_ext.trainer.health import Health
from spo_ext.trainer.metrics import (
    Meter,
    RunLog,
    add_loss,
    add_mismatch,
    add_online,
    add_tokens,
    add_turns,
    show_progress,
)
from spo_ext.trainer.model import (
    HeadSettings,
    answer_logprobs,
    autocast,
    base_model,
    choose_layout,
    completion_scores,
    keep_logprobs,
    precision_of,
    round_like_sharded,
)
from spo_ext.trainer.producer import Producer, SharedRollouts
from spo_ext.trainer.publish import ServerPublisher, make_publisher
from spo_ext.trainer.reference import Reference, reference_model
from spo_ext.trainer.weights import (
    group_baseline,
    importance_sampled,
    sequence_weights,
    soft_baseline,
)

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
        generator: writes the completions of embedded rollouts and evaluations: a
            `spo_ext.rollout.Generator`, which has to write as the policy now is; by default the
            policy in memory writes them itself.
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
        generator: Generator | None = None,
        **options: Any,
    ) -> None:
        if reward is not None and reward_funcs is not None:
            refuse("SPOTrainer", "reward_funcs", "left out with reward, which it is", reward_funcs)
        reward = reward if reward_funcs is None else reward_funcs
        if generator is not None and not callable(getattr(generator, "generate", None)):
            refuse(
                "SPOTrainer", "generator", "an object with generate(prompts, sampling)", generator
            )
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
        self._spent: dict[str, float] = {}
        self._learned_tokens, self._handed = 0, 0.0  # handed: when the step had its batch
        self._health = Health(args.beta, args.objective, args.reward_range)
        self._output = Path(str(args.output_dir))
        self.store = TrajectoryStore(str(args.store), retry_s=args.store_retry_seconds)
        self.store.require_writable("train")  # which keeps what was drawn
        self._reward = None if reward is None else as_reward(reward, args.reward_weights)
        self._router = router_coefficient("SPOConfig", model, args.router_aux_loss_coef)
        self.reference = self._prepare(model, ref_model)
        completions = args.rollout_batch_size * args.num_generations
        self.generator: Generator = generator or ModelGenerator(
            model, processing_class, batch_size=completions
        )
        if args.eval_strategy != "no":
            self._eval_prompts()  # now, not after the first steps
        self._producer = self._make_producer() if args.rollouts == "embedded" else None
        self._publisher = make_publisher(
            args.publish_url, args.publish_to, args.publish_keep, str(args.run)
        )
        self._feed = Feed(
            args,
            self.store,
            self.reference,
            self._prompt_values() if args.needs_q0 else None,
            self.layout,
            None if self._producer is None else self._producer.more,
            self._waiting,
            rope_limit(base_model(model).config),
        )
        head = base_model(model).get_output_embeddings()
        trains = any(parameter.requires_grad for parameter in head.parameters())
        # A frozen head takes half the products, but not with the entropy (`spo_ext.explain`).
        self._log_entropy = trains if args.log_entropy is None else args.log_entropy
        self.add_callback(RunLog(args, self._spend))
        show_progress(self)

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
            self.meter.totals = state.get("totals", {})
        self._feed.start(step, resume)
        self.accelerator.wait_for_everyone()
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self._publisher is not None and self.accelerator.is_main_process:
            self._publisher.finish()
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
        version, lag = divmod(step, self.args.sync_every)
        if lag == 0:
            self._begin_version(version)
        metrics, micro_batches = self._feed.next_step(version)
        self.meter.put(metrics)
        # input_ids are there for the Trainer, which counts them.
        ids = [one.tokens.model_inputs["input_ids"] for one in micro_batches]
        self._learned_tokens += sum(read.numel() for read in ids)
        self._handed = time.perf_counter()
        self.meter.put({"time/batch": self._handed - started})
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
        ref_logprobs, cu_seqlens = batch.ref_logprobs.to(device), batch.cu_seqlens.to(device)
        # DDP and FSDP2 average the gradients of the ranks.
        share = batch.share * self.accelerator.num_processes
        weights = sequence_weights(self.args, logprobs, rewards, batch)
        q0, options = batch.q0, self.args.loss_options()
        if self.args.own_baseline:
            q0 = group_baseline(self.args, logprobs, ref_logprobs, batch)
        elif self.args.q0 == "group_soft":
            q0 = soft_baseline(self.args, batch)
        if self.state.global_step % self.args.sync_every == 0:
            add_mismatch(meter, batch, logprobs)
        learned, weights = importance_sampled(self.args, logprobs, batch, weights)
        paid = None if batch.token_rewards is None else batch.token_rewards.to(device)
        loss, stats = spo_ext.loss(
            learned,
            ref_logprobs[None],  # per token, though there be as many sequences
            rewards,
            None if q0 is None else q0.to(device),
            cu_seqlens=cu_seqlens,
            groups=batch.groups.to(device) if options["objective"] == "group" else None,
            weights=weights,
            return_stats=True,
            token_rewards=paid,
            **options,
        )
        if weights is not None:
            meter.add("spo/weight", weights)
        add_tokens(meter, logprobs, ref_logprobs, entropy)
        add_loss(meter, stats, rewards, batch.floor)
        add_online(meter, batch)
        add_turns(meter, batch)
        scaled: Tensor = loss * share
        if router_loss is not None:
            meter.add("aux_loss", router_loss[None])
            counted = self._router if batch.share > 0 else 0.0
            scaled = scaled + counted * router_loss / self.current_gradient_accumulation_steps
        return scaled

    def _spend(self) -> None:
        """What the run has cost this rank since the last call, at the end of a step."""
        now = {
            "cost/learned_tokens": self._learned_tokens,
            "cost/scored_tokens": self.reference.scored_tokens,
            "cost/scoring_seconds": self.reference.scoring_seconds,
        }
        if self._producer is not None:
            shared = self._producer.shared
            now |= {"cost/sampled_tokens": shared.tokens, "cost/sampling_seconds": shared.seconds}
        self.meter.spend({name: value - self._spent.get(name, 0) for name, value in now.items()})
        self.meter.spend({"cost/learning_seconds": time.perf_counter() - self._handed})
        self._spent = now

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
        found = evaluate(
            self._eval_prompts(),
            self.generator,
            self.reward,
            sampling=self._sampling(self.args.eval_samples),
            ks=self.args.eval_k,
            decode=self.decode,
            success=self.args.eval_success,
        )
        values = found.values().items()
        metrics = {f"{metric_key_prefix}_{name}": estimate.mean for name, estimate in values}
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
            state["totals"] = self.meter.totals
            checkpoints.mark_complete(folder, state)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(self._output), keep, best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _last_checkpoint(self) -> Path | None:
        if self.args.should_save:
            checkpoints.remove_torn(self._output)
        self.accelerator.wait_for_everyone()
        return checkpoints.last_complete(self._output)

    @property
    def reward(self) -> Reward:
        """Made when it is first needed: a learner without rollouts needs no sandbox."""
        if self._reward is None:
            self._reward = as_reward(self.args.rewards, self.args.reward_weights)
        return self._reward

    def decode(self, token_ids: Sequence[int]) -> str:
        """A completion as text, without special tokens."""
        tokenizer: Any = self.processing_class
        if tokenizer is None:
            refuse("SPO", "processing_class", "a tokenizer, for rollouts and evaluation", None)
        return decoded(tokenizer, token_ids)

    @property
    def _sharded(self) -> bool:
        """Whether a forward pass of the policy takes all ranks."""
        return bool(self.is_fsdp_enabled)

    def _sampling(self, n: int) -> Sampling:
        args = self.args
        return Sampling(n, args.temperature, args.top_p, args.max_new_tokens, args.seed)

    def _prepare(self, model: nn.Module, ref_model: nn.Module | None) -> Reference:
        """Lets policy and reference answer log-probabilities, and finds out how to call them."""
        args = self.args
        settings = HeadSettings(
            args.temperature, args.max_dropped_mass, args.workspace_mib, args.disable_dropout
        )
        check_tasks("SPOTrainer", model)
        precision = precision_of(self.accelerator)
        scorer = reference_model(args, model, ref_model, share=not self._sharded)
        answer_logprobs(model, settings)
        keep_logprobs(self.accelerator)
        if scorer is not None and scorer is not model:
            answer_logprobs(scorer, settings)
            scorer.to(args.device)
            round_like_sharded(scorer, self.accelerator)
        with autocast(model, precision):
            # The loss of a router is a mean over the tokens that are computed.
            self.layout = choose_layout(
                args.packing, model, training=args.disable_dropout, sharing=not self._router
            )
        how: Any = {"layout": self.layout, "precision": precision}
        if scorer is None:
            if args.reference == "behaviour":
                return Reference.behaviour(self.store, args.temperature)
            return Reference.cached(self.store, args.reference_fingerprint, **how)
        if ref_model is not None:  # a copy of the policy is called as the policy is
            with autocast(scorer, precision):
                how["layout"] = choose_layout(args.packing, scorer)
        base_only = scorer is model
        return Reference.of_model(
            self.store,
            scorer,
            self.processing_class,
            args.temperature,
            base_only=base_only,
            accelerator=self.accelerator if base_only and self._sharded else None,
            **how,
        )

    def _make_producer(self) -> Producer:
        return Producer(
            self.args,
            self.store,
            self.generator,
            self.reward,
            self.decode,
            self.accelerator,
            replicated=self._sharded,
        )

    def _begin_version(self, version: int) -> None:
        """Publishes the policy as it is, and rolls it out."""
        started = time.perf_counter()
        if self._publisher is not None:
            model, accelerator = self.model_wrapped, self.accelerator
            weights = accelerator.get_state_dict(model) if self._sharded else None
            if accelerator.is_main_process:
                unwrapped = accelerator.unwrap_model(model)
                self._publisher.publish(unwrapped, self.processing_class, version, weights)
            accelerator.wait_for_everyone()
        published = time.perf_counter()
        if self._producer is not None:
            self.meter.put(self._producer.round(version))
        times = {"time/publish": published - started}
        self.meter.put(times | {"time/rollout": time.perf_counter() - published})

    def _waiting(self) -> None:
        """While the main process waits for trajectories of others."""
        if isinstance(self._publisher, ServerPublisher):
            self._publisher.restore()

    def _eval_prompts(self) -> list[StoredPrompt]:
        split = self.args.eval_split
        known = judged_by(self.reward, self.store.prompts(split))
        prompts = list(itertools.islice(known, self.args.eval_prompts))
        if not prompts:
            expected = "a split with prompts in the store that the reward can judge"
            refuse("SPO", "eval_split", expected, split)
        return prompts

    def _prompt_values(self) -> PromptValues | None:
        args = self.args
        can_sample = args.q0_samples > 0 and self.reference.model is not None
        return PromptValues(
            self.store,
            beta=args.beta,
            temperature=args.temperature,
            top_p=args.top_p,
            reference=self.reference.fingerprint,
            estimate=self._sample_reference if can_sample else None,
        )

    def _sample_reference(self, prompts: Sequence[StoredPrompt]) -> None:
        """Values of prompts that have none, from completions that the reference writes for them."""
        args, model = self.args, self.reference.model
        assert model is not None
        run = f"reference-{self.reference.fingerprint[:16]}"
        sampling = self._sampling(args.q0_samples)
        generator = ModelGenerator(model, self.processing_class)
        rollouts = Rollouts(
            self.store, generator, self.reward, run=run, sampling=sampling, decode=self.decode
        )
        replicated = self._sharded and model is self.model
        shared = SharedRollouts(
            rollouts, generator, sampling.n, self.accelerator, replicated=replicated
        )
        with self.reference.speaking():
            shared.collect(prompts, 0)
        if self.accelerator.is_main_process:
            estimate_q0(
                self.store,
                prompts,
                run=run,
                beta=args.beta,
                temperature=args.temperature,
                top_p=args.top_p,
                reward_range=(args.reward_range[0], args.reward_range[1]),
                reference=self.reference.fingerprint,
            )
        self.accelerator.wait_for_everyone()
