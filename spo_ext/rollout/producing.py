"""What `spo rollout` does with its arguments."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spo_ext.commands import fail, failures, import_from_here, require_store
from spo_ext.data.tokens import Tokenizer
from spo_ext.rollout.counts import ids_of_split
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.rollout.follow import latest_policy, new_policies, prompt_stream
from spo_ext.rollout.generation import Generator, Reward, Sampling
from spo_ext.rollout.loading import load_model
from spo_ext.rollout.rewards import load_reward, needs_of, test_options
from spo_ext.rollout.rollouts import Rollouts
from spo_ext.rollout.server import ServerGenerator
from spo_ext.rollout.stopping import Stopping, progress_bar
from spo_ext.rollout.values import estimate_q0
from spo_ext.store import StoredPrompt, TrajectoryStore


def produce(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        sampling = _checked(options)
    except ValueError as error:
        options.error(str(error))  # exits with status 2
    try:
        require_store(options.store)
        import_from_here()
        reward = _reward(options)
        try:
            with TrajectoryStore(options.store) as store, Stopping() as stopping:
                producer = _Producer(store, reward, sampling, options, stopping.requested)
                if options.follow is not None:
                    producer.follow()
                    return 0
                producer.once()
                if stopping.requested():
                    return fail("interrupted; what was stored stays", status=130)
                return 0
        finally:
            getattr(reward, "close", lambda: None)()
    except KeyboardInterrupt:
        return fail("interrupted; what was stored stays", status=130)
    except failures() as error:
        return fail(error)


class _Producer:
    """Rollouts of one policy, or of each that is published."""

    def __init__(
        self,
        store: TrajectoryStore,
        reward: Reward,
        sampling: Sampling,
        options: argparse.Namespace,
        stop: Callable[[], bool],
    ) -> None:
        self._store, self._reward, self._sampling = store, reward, sampling
        self._options, self._stop = options, stop
        self._tokenizer: Tokenizer | None = None

    def once(self) -> None:
        """Of --model or --server."""
        options = self._options
        version = options.policy_version
        ids = self._prompt_ids()
        tokenizer = self._tokenizer_of(options.model)
        if options.model is not None:
            model = self._load(options.model)
            self._collect(ids, version, self._embedded(model, tokenizer), tokenizer)
        else:
            with _server(options, tokenizer) as generator:
                self._collect(ids, version, generator, tokenizer)
        if options.q0_beta is not None and not self._stop():
            self._estimate(ids)

    def follow(self) -> None:
        """Of every version published in --follow."""
        options = self._options
        per_version = options.prompts_per_version
        newest = new_policies(options.follow, until_version=options.until_version, stop=self._stop)
        for version, folder in newest:
            try:
                tokenizer = self._tokenizer_of(folder)
                model = self._load(folder)
            except (OSError, ValueError):
                newer = latest_policy(options.follow)
                if newer is not None and newer[0] > version:
                    continue  # its folder was removed while it was read
                raise
            ids = self._prompt_ids()
            ids = prompt_stream(ids, self._sampling.seed, version * per_version, per_version)
            self._collect(ids, version, self._embedded(model, tokenizer), tokenizer)
            del model  # before the next one is loaded

    def _prompt_ids(self) -> list[int]:
        """Of the split, as far as the reward can judge. Raises ValueError if there are none."""
        options, needs = self._options, needs_of(self._reward)
        ids = ids_of_split(self._store, options.split, needs)[: options.prompts]
        if not ids:
            which = f"{options.split}{f' with {needs}' if needs else ''}"
            raise ValueError(f"the store must have prompts of split {which}, got none")
        return ids

    def _collect(
        self, ids: Sequence[int], version: int, generator: Generator, tokenizer: Tokenizer
    ) -> None:
        options = self._options
        rollouts = Rollouts(
            self._store,
            generator,
            self._reward,
            run=options.run_name,
            sampling=self._sampling,
            decode=lambda token_ids: str(tokenizer.completion("", tuple(token_ids))),
            prompts_per_batch=options.batch_size,
            origin_model=options.origin_model,
        )
        prompts = self._store.get_prompts(ids)
        if options.min_trajectories:
            drawn = rollouts.drawn(prompts, version)
            prompts = [p for p in prompts if drawn.get(p.id, 0) < options.min_trajectories]
        ready = [_tokenised(prompt, tokenizer) for prompt in prompts]
        with progress_bar(len(ready), f"version {version}", options.quiet) as advance:
            stats = rollouts.collect(ready, version, advance, stop=self._stop)
        left_out = len(ids) - len(prompts)
        done = f"; {left_out} prompts had enough" if left_out else ""
        print(f"version {version}: {stats}{done}", flush=True)

    def _estimate(self, ids: Sequence[int]) -> None:
        options, sampling = self._options, self._sampling
        worst_best = options.q0_range or getattr(self._reward, "reward_range", None)
        count = estimate_q0(
            self._store,
            self._store.get_prompts(ids),
            run=options.run_name,
            beta=options.q0_beta,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            smoothing=options.q0_smoothing,
            reward_range=None if worst_best is None else (worst_best[0], worst_best[1]),
            reference=options.q0_reference,
            policy_version=options.policy_version,
        )
        print(f"Q_0 of {count} prompts for beta {options.q0_beta:g}", flush=True)

    def _tokenizer_of(self, folder: Path | None) -> Tokenizer:
        """The one given; else that of the first policy, which later ones share."""
        if self._tokenizer is None:
            where = self._options.tokenizer or folder
            assert where is not None  # checked for servers
            self._tokenizer = Tokenizer(where)
        return self._tokenizer

    def _load(self, folder: Path) -> Any:
        options = self._options
        return load_model(folder, options.device, options.dtype, options.quiet)

    def _embedded(self, model: Any, tokenizer: Tokenizer) -> ModelGenerator:
        return ModelGenerator(model, tokenizer, batch_size=self._options.generate_batch)


def _checked(options: argparse.Namespace) -> Sampling:
    """Raises ValueError for arguments that do not go together, or are out of range."""
    sampling = Sampling(
        options.n, options.temperature, options.top_p, options.max_new_tokens, options.seed
    )
    if options.server is not None:
        for name in ("served_model", "tokenizer"):
            if getattr(options, name) is None:
                raise ValueError(f"--{name.replace('_', '-')} must be given with --server")
    if options.follow is not None and (options.q0_beta is not None or options.origin_model):
        raise ValueError("--q0-beta and --origin-model must not be given with --follow")
    if options.q0_beta is not None and options.origin_model is not None:
        raise ValueError(
            "--q0-beta must not be given with --origin-model, no reference of this run"
        )
    if options.q0_beta is not None and not 0 < options.q0_beta < math.inf:
        raise ValueError(f"--q0-beta must be > 0, got {options.q0_beta}")
    for name in ("prompts", "batch_size", "generate_batch", "prompts_per_version"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    if options.policy_version < 0:
        raise ValueError(f"--policy-version must be >= 0, got {options.policy_version}")
    if options.min_trajectories is None:
        options.min_trajectories = sampling.n if options.follow is not None else 0
    return sampling


def _reward(options: argparse.Namespace) -> Reward:
    if options.reward not in ("tests", "answer"):
        return load_reward(options.reward)
    given: dict[str, Any] = {"passed": options.reward_passed, "failed": options.reward_failed}
    if options.reward == "tests":
        given |= test_options(options.sandbox_workers, options.test_seconds)
    return load_reward(options.reward, **given)


def _server(options: argparse.Namespace, tokenizer: Tokenizer) -> ServerGenerator:
    key = None
    if options.api_key_from is not None:
        key = os.environ.get(options.api_key_from)
        if key is None:
            raise ValueError(f"--api-key-from: the environment has no {options.api_key_from}")
    end = tokenizer.eos_token_id
    return ServerGenerator(
        options.server,
        options.served_model,
        dialect=options.dialect,
        tokenizer=tokenizer,
        api_key=key,
        timeout_s=options.timeout,
        retries=options.retries,
        concurrency=options.concurrency,
        logprobs=options.server_logprobs,
        end_ids=() if end is None else (end,),
    )


def _tokenised(prompt: StoredPrompt, tokenizer: Tokenizer) -> StoredPrompt:
    if prompt.token_ids is not None:
        return prompt
    return replace(prompt, token_ids=tokenizer.prompt_ids(prompt.content))
