"""What `spo rollout` does with its arguments."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from spo_ext.commands import fail, failures, import_from_here, require_store
from spo_ext.data.tokens import Tokenizer
from spo_ext.environments import Environment, fill
from spo_ext.integrations.heads import longest
from spo_ext.models import load_model
from spo_ext.rollout.arguments import (
    checked_sampling,
    make_environment,
    make_reward,
    make_server,
)
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.rollout.follow import latest_policy, new_policies, prompt_stream
from spo_ext.rollout.generation import Generator, Reward, Sampling
from spo_ext.rollout.rewards import named_split, needs_of
from spo_ext.rollout.rollouts import Rollouts
from spo_ext.rollout.served import ServedPolicy
from spo_ext.rollout.server import ServerError, ServerGenerator
from spo_ext.rollout.values import estimate_q0
from spo_ext.shown import say
from spo_ext.store import StoredPrompt, TrajectoryStore
from spo_ext.store.counts import ids_of_split

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """While it is entered, the first SIGINT or SIGTERM asks for an end and the second interrupts.

    In the main thread only, as signal handlers are.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: list[Any] = []

    def requested(self) -> bool:
        return self._requested

    def __enter__(self) -> Stopping:
        self._before = [signal.signal(number, self._ask) for number in _SIGNALS]
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print("spo: stopping after the batch at hand", file=sys.stderr)


@contextmanager
def progress_bar(total: int, name: str, quiet: bool) -> Iterator[Callable[[int], object] | None]:
    """What moves the bar on, None if there is none: when quiet, or without tqdm."""
    if quiet or total == 0:
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, desc=name, unit="prompt", dynamic_ncols=True) as bar:
        yield bar.update


def produce(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        sampling = checked_sampling(options)
    except ValueError as error:
        options.error(str(error))  # exits with status 2
    try:
        import_from_here()
        environment = make_environment(options)
        if environment is None:
            require_store(options.store)
        how = {"passed": options.reward_passed, "failed": options.reward_failed}
        reward = make_reward(options, **how) if environment is None else environment.reward
        try:
            with (
                TrajectoryStore(options.store, retry_s=options.store_retry) as store,
                Stopping() as stopping,
            ):
                store.require_writable("rollout")
                stop = stopping.requested
                producer = _Producer(store, reward, environment, sampling, options, stop)
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
        environment: Environment | None,
        sampling: Sampling,
        options: argparse.Namespace,
        stop: Callable[[], bool],
    ) -> None:
        self._store, self._reward, self._sampling = store, reward, sampling
        self._environment = environment
        self._options, self._stop = options, stop
        self._tokenizer: Tokenizer | None = None
        self._ids: list[int] = []  # of the environment's prompts

    def once(self) -> None:
        """Of --model or --server."""
        options = self._options
        version = options.policy_version
        tokenizer = self._tokenizer_of(options.model)
        ids = self._prompt_ids()
        if options.model is not None:
            self._collect_of(self._load(options.model), ids, version, tokenizer)
        else:
            with make_server(options, tokenizer) as server:
                self._serve_once(server, ids, tokenizer)
        if options.q0_beta is not None and not self._stop():
            self._estimate(ids)

    def follow(self) -> None:
        """Of every version published in --follow."""
        options = self._options
        newest = new_policies(
            options.follow,
            run=options.run_name,
            until_version=options.until_version,
            stop=self._stop,
        )
        if options.server is not None:
            self._follow_on_server(newest)
            return
        for version, folder in newest:
            try:
                tokenizer = self._tokenizer_of(folder)
                model = self._load(folder)
            except (OSError, ValueError):
                if self._newest() != version:
                    continue  # its folder was removed while it was read
                raise
            self._collect_of(model, self._stream(version), version, tokenizer)
            del model  # before the next one is loaded

    def _serve_once(
        self, server: ServerGenerator, ids: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        options = self._options
        served = ServedPolicy(server, self._store, options.run_name)
        served.begin(options.policy_version if options.origin_model is None else None)
        stop = lambda: self._stop() or served.changed  # noqa: E731
        self._collect(ids, options.policy_version, served, tokenizer, stop, server.context())
        served.check_answered()
        if served.changed:
            raise ServerError("the server's weights changed: what came before is stored")

    def _follow_on_server(self, newest: Iterator[tuple[int, Path]]) -> None:
        """Each version until the server gets another, of which later completions would be."""
        options, tokenizer = self._options, self._tokenizer_of(None)
        with make_server(options, tokenizer, self._newest) as server:
            served = ServedPolicy(server, self._store, options.run_name)
            for version, _ in newest:
                past = partial(self._is_past, version, served)
                rounds = 2  # a trainer may wait for prompts that had no answer
                while rounds and served.await_version(options.follow, version, self._stop):
                    ids, room = self._stream(version), server.context()
                    self._collect(ids, version, served, tokenizer, past, room)
                    if not served.changed:
                        rounds = rounds - 1 if served.failed else 0

    def _is_past(self, version: int, served: ServedPolicy) -> bool:
        return self._stop() or served.changed or self._newest() != version

    def _newest(self) -> int | None:
        found = latest_policy(self._options.follow)
        return None if found is None else found[0]

    def _stream(self, version: int) -> list[int]:
        """Ids of the version's prompts."""
        count = self._options.prompts_per_version
        return prompt_stream(self._prompt_ids(), self._sampling.seed, version * count, count)

    def _prompt_ids(self) -> list[int]:
        """Of the split, as far as the reward can judge. Raises ValueError if there are none."""
        options, reward = self._options, self._reward
        if self._environment is not None:
            assert self._tokenizer is not None  # of the policy, whichever
            given = (self._store, self._environment, options.split, self._tokenizer)
            self._ids = self._ids or fill(*given)
            return self._ids[: options.prompts]
        ids = ids_of_split(self._store, options.split, needs_of(reward))[: options.prompts]
        if not ids:
            which = named_split(options.split, reward)
            raise ValueError(f"the store must have prompts of split {which}, got none")
        return ids

    def _collect_of(
        self, model: Any, ids: Sequence[int], version: int, tokenizer: Tokenizer
    ) -> None:
        """By a model in this process."""
        generator = ModelGenerator(model, tokenizer, batch_size=self._options.generate_batch)
        self._collect(ids, version, generator, tokenizer, room=longest(model))

    def _collect(
        self,
        ids: Sequence[int],
        version: int,
        generator: Generator,
        tokenizer: Tokenizer,
        stop: Callable[[], bool] | None = None,
        room: int | None = None,
    ) -> None:
        """room: tokens of a context, where that is known."""
        options, environment = self._options, self._environment
        drawing = generator
        if environment is not None:
            drawing = environment.generator(generator, tokenizer, room)
        rollouts = Rollouts(
            self._store,
            drawing,
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
        left_out = len(ids) - len(prompts)
        ready = [_tokenised(prompt, tokenizer) for prompt in prompts]
        if isinstance(generator, ServedPolicy):
            ready = generator.possible(ready, self._sampling)
        refused = len(prompts) - len(ready)
        try:
            with progress_bar(len(ready), f"version {version}", options.quiet) as advance:
                stats = rollouts.collect(ready, version, advance, stop=stop or self._stop)
        finally:
            if drawing is not generator:
                getattr(drawing, "close", lambda: None)()
        done = f"; {left_out} prompts had enough" if left_out else ""
        done += f"; {refused} left out, which the server refused" if refused else ""
        say(f"version {version}: {stats}{done}")

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
        say(f"Q_0 of {count} prompts for beta {options.q0_beta:g}")

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


def _tokenised(prompt: StoredPrompt, tokenizer: Tokenizer) -> StoredPrompt:
    if prompt.token_ids is not None:
        return prompt
    return replace(prompt, token_ids=tokenizer.prompt_ids(prompt.content, prompt.template))
