"""What `SPOTrainer` is made of, put together from its settings."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from spo_ext.data.tokens import decoded
from spo_ext.evaluation.evaluate import evaluate
from spo_ext.integrations.adapters import check_tasks
from spo_ext.integrations.agreement import rope_limit
from spo_ext.rollout import Reward, Sampling
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.rollout.rewards import as_reward, judged_by
from spo_ext.rollout.rollouts import Rollouts
from spo_ext.rollout.values import estimate_q0
from spo_ext.store import StoredPrompt, TrajectoryStore
from spo_ext.store.checks import refuse
from spo_ext.trainer.feed import Feed, MicroBatch
from spo_ext.trainer.model import (
    HeadSettings,
    answer_logprobs,
    base_model,
    choose_layout,
)
from spo_ext.trainer.precision import autocast, keep_logprobs, precision_of, round_like_sharded
from spo_ext.trainer.producer import Producer
from spo_ext.trainer.publish_server import ServerPublisher, make_publisher
from spo_ext.trainer.reference import Reference, reference_model
from spo_ext.trainer.together import SharedRollouts
from spo_ext.trainer.values import PromptValues

if TYPE_CHECKING:
    from spo_ext.trainer.trainer import SPOTrainer


class Parts:
    """The store and what stands between it and the steps of one run."""

    def __init__(self, trainer: SPOTrainer, ref_model: nn.Module | None, reward: Any) -> None:
        config, model = trainer.args, trainer.model
        assert model is not None
        self._config, self._trainer = config, trainer
        self.store = TrajectoryStore(str(config.store), retry_s=config.store_retry_seconds)
        self.store.require_writable("train")  # which keeps what was drawn
        settings = HeadSettings(
            config.temperature,
            config.max_dropped_mass,
            config.workspace_mib,
            config.disable_dropout,
        )
        check_tasks("SPOTrainer", model)
        self._precision = precision_of(trainer.accelerator)
        scorer = reference_model(config, model, ref_model, share=not self._sharded)
        answer_logprobs(model, settings)
        keep_logprobs(trainer.accelerator)
        if scorer is not None and scorer is not model:
            answer_logprobs(scorer, settings)
            scorer.to(config.device)
            round_like_sharded(scorer, trainer.accelerator)
        with autocast(model, self._precision):
            self.layout = choose_layout(config.packing, model, training=config.disable_dropout)
        self.reference = self._reference(scorer, given=ref_model is not None)
        self._generator = ModelGenerator(
            model,
            trainer.processing_class,
            batch_size=config.rollout_batch_size * config.samples_per_prompt,
        )
        self._reward = None if reward is None else as_reward(reward, config.reward_weights)
        self._producer = self._make_producer() if config.rollouts == "embedded" else None
        produce = None if self._producer is None else self._producer.more
        values = self._prompt_values() if config.needs_q0 else None
        if config.eval_strategy != "no":
            self._eval_prompts()  # now, not after the first steps
        self._publisher = make_publisher(
            config.publish_url, config.publish_to, config.publish_keep, str(config.run)
        )
        limit = rope_limit(base_model(model).config)
        self._feed = Feed(
            config, self.store, self.reference, values, self.layout, produce, self._waiting, limit
        )

    def start(self, step: int, resume: bool) -> None:
        """Before training from this step on; see `Feed.start`."""
        self._feed.start(step, resume)
        self._trainer.accelerator.wait_for_everyone()

    def before_step(self, step: int, model: nn.Module) -> dict[str, float]:
        """Where a policy version begins, it is published and rolled out; returns metrics."""
        if step % self._config.sync_every:
            return {}
        version = step // self._config.sync_every
        started = time.perf_counter()
        self._publish(model, version)
        published = time.perf_counter()
        metrics = {} if self._producer is None else self._producer.round(version)
        metrics["time/publish"] = published - started
        metrics["time/rollout"] = time.perf_counter() - published
        return metrics

    def next_step(self, step: int) -> tuple[dict[str, float], list[MicroBatch]]:
        """See `Feed.next_step`."""
        return self._feed.next_step(step // self._config.sync_every)

    def finish(self) -> None:
        """Tells those who follow the published policies that there will be no more."""
        if self._publisher is not None and self._trainer.accelerator.is_main_process:
            self._publisher.finish()

    def _waiting(self) -> None:
        """While the main process waits for trajectories of others."""
        if isinstance(self._publisher, ServerPublisher):
            self._publisher.restore()

    def _publish(self, model: nn.Module, version: int) -> None:
        if self._publisher is None:
            return
        accelerator = self._trainer.accelerator
        weights = accelerator.get_state_dict(model) if self._sharded else None
        if accelerator.is_main_process:
            unwrapped = accelerator.unwrap_model(model)
            self._publisher.publish(unwrapped, self._trainer.processing_class, version, weights)
        accelerator.wait_for_everyone()

    def evaluate(self) -> dict[str, float]:
        """pass@k and the rest of `spo_ext.evaluation`, by every rank alike."""
        config = self._config
        sampling = Sampling(
            config.eval_samples,
            config.temperature,
            config.top_p,
            config.max_new_tokens,
            config.seed,
        )
        found = evaluate(
            self._eval_prompts(),
            self._generator,
            self.reward,
            sampling=sampling,
            ks=config.eval_k,
            decode=self.decode,
            success=config.eval_success,
        )
        return {name: estimate.mean for name, estimate in found.values().items()}

    def _eval_prompts(self) -> list[StoredPrompt]:
        split = self._config.eval_split
        known = judged_by(self.reward, self.store.prompts(split))
        prompts = list(itertools.islice(known, self._config.eval_prompts))
        if not prompts:
            expected = "a split with prompts in the store that the reward can judge"
            refuse("SPO", "eval_split", expected, split)
        return prompts

    @property
    def _sharded(self) -> bool:
        """Whether a forward pass of the policy takes all ranks."""
        return bool(self._trainer.is_fsdp_enabled)

    @property
    def reward(self) -> Reward:
        """Made when it is first needed: a learner without rollouts needs no sandbox."""
        if self._reward is None:
            self._reward = as_reward(self._config.rewards, self._config.reward_weights)
        return self._reward

    def decode(self, token_ids: Sequence[int]) -> str:
        """A completion as text, without special tokens."""
        tokenizer: Any = self._trainer.processing_class
        if tokenizer is None:
            refuse("SPO", "processing_class", "a tokenizer, for rollouts and evaluation", None)
        return decoded(tokenizer, token_ids)

    def _reference(self, model: nn.Module | None, given: bool) -> Reference:
        config, trainer = self._config, self._trainer
        how: Any = {"layout": self.layout, "precision": self._precision}
        if model is not None and given:  # a copy of the policy is called as the policy is
            with autocast(model, self._precision):
                how["layout"] = choose_layout(config.packing, model)
        if model is None:
            return Reference.cached(self.store, config.reference_fingerprint, **how)
        base_only = model is trainer.model
        return Reference.of_model(
            self.store,
            model,
            trainer.processing_class,
            config.temperature,
            base_only=base_only,
            accelerator=trainer.accelerator if base_only and self._sharded else None,
            **how,
        )

    def _make_producer(self) -> Producer:
        return Producer(
            self._config,
            self.store,
            self._generator,
            self.reward,
            self.decode,
            self._trainer.accelerator,
            replicated=self._sharded,
        )

    def _prompt_values(self) -> PromptValues:
        config = self._config
        can_sample = config.q0_samples > 0 and self.reference.model is not None
        return PromptValues(
            self.store,
            beta=config.beta,
            temperature=config.temperature,
            top_p=config.top_p,
            reference=self.reference.fingerprint,
            estimate=self._sample_reference if can_sample else None,
        )

    def _sample_reference(self, prompts: Sequence[StoredPrompt]) -> None:
        """Values of prompts that have none, from completions that the reference writes for them."""
        config, model = self._config, self.reference.model
        assert model is not None
        run = f"reference-{self.reference.fingerprint[:16]}"
        sampling = Sampling(
            config.q0_samples, config.temperature, config.top_p, config.max_new_tokens, config.seed
        )
        generator = ModelGenerator(model, self._trainer.processing_class)
        rollouts = Rollouts(
            self.store, generator, self.reward, run=run, sampling=sampling, decode=self.decode
        )
        accelerator = self._trainer.accelerator
        replicated = self._sharded and model is self._trainer.model
        shared = SharedRollouts(rollouts, generator, sampling.n, accelerator, replicated=replicated)
        with self.reference.speaking():
            shared.collect(prompts, 0)
        if accelerator.is_main_process:
            self._estimate(prompts, run)
        accelerator.wait_for_everyone()

    def _estimate(self, prompts: Sequence[StoredPrompt], run: str) -> None:
        config = self._config
        estimate_q0(
            self.store,
            prompts,
            run=run,
            beta=config.beta,
            temperature=config.temperature,
            top_p=config.top_p,
            reward_range=(config.reward_range[0], config.reward_range[1]),
            reference=self.reference.fingerprint,
        )
