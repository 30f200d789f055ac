"""From prompts to stored trajectories: generate, judge, append."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby

from spo_ext.checks import check_integer, check_name, refuse
from spo_ext.rollout.draws import derived_seed
from spo_ext.rollout.generation import (
    Generation,
    Generator,
    Judgement,
    Reward,
    Sampling,
    check_judgements,
)
from spo_ext.rollout.rewards import look_at
from spo_ext.rollout.stats import RolloutStats, Tally
from spo_ext.store import Origin, StoredPrompt, Trajectory, TrajectoryStore
from spo_ext.store.counts import draws

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Call:
    """Of a generator: the prompts, how to sample, and how many completions each had before."""

    prompts: list[StoredPrompt]
    sampling: Sampling
    drawn: int


class Rollouts:
    """A producer: completions of stored prompts, judged and appended to the store.

    Args:
        store: receives a batch in one transaction, so that a kill loses at most the batch that is
            judged and the one that is generated meanwhile.
        generator: runs in a thread of its own, one call at a time.
        reward: runs in the caller's thread.
        run: name of the run that the trajectories belong to.
        sampling: n completions of each prompt. Its seed, the policy's version, the prompt and how
            many of its completions are stored decide what a generator draws that keeps its promise.
        decode: token ids to text without special tokens.
        prompts_per_batch: generated and judged at once.
        origin_model: name of another model that generates; None: it is the run's policy.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        generator: Generator,
        reward: Reward,
        *,
        run: str,
        sampling: Sampling,
        decode: Decode,
        prompts_per_batch: int = 8,
        origin_model: str | None = None,
    ) -> None:
        check_name("Rollouts", "run", run)
        check_integer("Rollouts", "prompts_per_batch", prompts_per_batch, 1)
        self._store, self._generator, self._reward = store, generator, reward
        self._run, self._sampling, self._decode = run, sampling, decode
        self._prompts_per_batch, self._origin_model = prompts_per_batch, origin_model

    def collect(
        self,
        prompts: Sequence[StoredPrompt],
        policy_version: int,
        progress: Callable[[int], object] | None = None,
        *,
        stop: Callable[[], bool] | None = None,
    ) -> RolloutStats:
        """Stores n completions of each prompt.

        Args:
            policy_version: of the policy that the generator now has.
            progress: called with the number of prompts after each batch that was stored.
            stop: asked before each batch; if it says yes, what was generated is still stored.

        What generator, reward and store raise comes through; earlier batches stay stored.
        """
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, StoredPrompt):
                refuse("collect", f"prompts[{index}]", "a StoredPrompt", prompt)
        look_at(self._reward, prompts)
        origin = self.origin(policy_version)
        tally, started = Tally(), time.perf_counter()
        with ThreadPoolExecutor(1, thread_name_prefix="spo-generate") as thread:

            def next_call() -> tuple[Call, Future[list[list[Generation]]]] | None:
                call = None if stop is not None and stop() else next(calls, None)
                if call is None:
                    return None
                generate = self._generator.generate
                return call, thread.submit(generate, call.prompts, call.sampling)

            calls = self._calls(prompts, origin, policy_version)
            at_hand = next_call()
            while at_hand is not None:
                call, future = at_hand
                generations = future.result()
                at_hand = next_call()  # generated while this one is judged
                self._store_batch(call, generations, origin, tally)
                if progress is not None:
                    progress(len(call.prompts))
        return tally.stats(time.perf_counter() - started)

    def origin(self, policy_version: int) -> Origin:
        """Who the trajectories of this version are from."""
        if self._origin_model is not None:
            return Origin("model", run=self._run, model=self._origin_model)
        return Origin("policy", run=self._run, policy_version=policy_version)

    def drawn(self, prompts: Sequence[StoredPrompt], policy_version: int) -> dict[int, int]:
        """How many completions of each prompt this version has in the store, by prompt id."""
        sampling = self._sampling
        origin = self.origin(policy_version)
        ids = [prompt.id for prompt in prompts]
        return draws(self._store, ids, origin, sampling.temperature, sampling.top_p)

    def plan(self, prompts: Sequence[StoredPrompt], policy_version: int) -> list[Call]:
        """The calls of the generator that `collect` would make now."""
        return list(self._calls(prompts, self.origin(policy_version), policy_version))

    def _calls(
        self, prompts: Sequence[StoredPrompt], origin: Origin, policy_version: int
    ) -> Iterator[Call]:
        """Prompts with as many completions as each other, and a seed that those did not have.

        So a rollout that is run again draws more completions, not the same ones, and one that was
        killed and is started again draws what it would have drawn.
        """
        drawn = self.drawn(prompts, policy_version)

        def before(prompt: StoredPrompt) -> int:
            count = drawn.get(prompt.id, 0)
            drawn[prompt.id] = count + self._sampling.n  # for a prompt that comes twice
            return count

        who = (origin.run, origin.model, policy_version)
        for count, group in groupby(((before(prompt), prompt) for prompt in prompts), _first):
            seed = derived_seed(self._sampling.seed, *who, count)
            sampling = replace(self._sampling, seed=seed)
            members = [prompt for _, prompt in group]
            for start in range(0, len(members), self._prompts_per_batch):
                yield Call(members[start : start + self._prompts_per_batch], sampling, count)

    def _store_batch(
        self, call: Call, generations: list[list[Generation]], origin: Origin, tally: Tally
    ) -> None:
        prompts, sampling = call.prompts, call.sampling
        got = [len(group) for group in generations]
        if len(got) != len(prompts) or not set(got) <= {0, sampling.n}:
            expected = f"one that returns {sampling.n} for each prompt, or none"
            refuse("collect", "generator", expected, got)
        judged = iter(self._judge(prompts, generations))
        trajectories: list[Trajectory] = []
        for prompt, group in zip(prompts, generations, strict=True):
            judgements = [next(judged) for _ in group]
            seen = Counter[tuple[int, ...]]()
            new = []
            for each, judgement in zip(group, judgements, strict=True):
                if judgement is not None:
                    ids = tuple(each.token_ids)
                    # Above all draws before, since equal ones of those have numbers below it.
                    draw = call.drawn + seen[ids]
                    new.append(_trajectory(prompt, each, judgement, origin, sampling, draw))
                    seen[ids] += 1
            tally.add_prompt(group, [each.reward for each in new])
            tally.add_parts(judgements)
            trajectories += new
        result = self._store.append(trajectories)
        tally.appended += result.new
        tally.duplicates += result.duplicates

    def _judge(
        self, prompts: list[StoredPrompt], generations: list[list[Generation]]
    ) -> list[Judgement | None]:
        """In order; None also for a completion without a token, which cannot be stored."""
        pairs = [
            (prompt, each)
            for prompt, group in zip(prompts, generations, strict=True)
            for each in group
        ]
        whole = [(prompt, each) for prompt, each in pairs if each.token_ids]
        texts = [self._decode(each.token_ids) for _, each in whole]
        found = self._reward([p for p, _ in whole], texts, [each.token_ids for _, each in whole])
        judged = iter(check_judgements("collect", found, len(whole)))
        return [next(judged) if each.token_ids else None for _, each in pairs]


def _first(pair: tuple[int, StoredPrompt]) -> int:
    return pair[0]


def _trajectory(
    prompt: StoredPrompt,
    generation: Generation,
    judgement: Judgement,
    origin: Origin,
    sampling: Sampling,
    draw: int,
) -> Trajectory:
    return Trajectory(
        prompt.id,
        generation.token_ids,
        judgement.reward,
        origin,
        generation.finish,
        reason=judgement.reason,
        behaviour_logprobs=generation.logprobs,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        draw=draw,
    )
