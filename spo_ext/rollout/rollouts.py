"""From prompts to stored trajectories: generate, judge, append, measure."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby

from spo_ext.checks import check_integer, check_name, refuse
from spo_ext.rollout.generation import (
    Generation,
    Generator,
    Judgement,
    Reward,
    Sampling,
    derived_seed,
    judge,
)
from spo_ext.rollout.rewards import look_at
from spo_ext.store import Origin, StoredPrompt, Trajectory, TrajectoryStore
from spo_ext.store.counts import draws


@dataclass(frozen=True, slots=True)
class RolloutStats:
    """Of the completions of one call of `Rollouts.collect`.

    prompts: those with completions; unanswered: those without any, which the generator could not
        draw.
    appended, duplicates: trajectories new to the store, and those that it had already, of a
        rollout that was run again. unjudged: completions without a reward, which are not stored.
    reward_*: of the judged ones; NaN if there are none. -inf counts as it is, so that a mean may
        be -inf. *_length: tokens that the policy wrote of all completions, end tokens included.
    frac_reward_zero_std: share of the prompts whose judged completions have one reward.
    parts: of a sum of several rewards the mean and the standard deviation of each, by name.
    entropy: nats a token, by the log-probabilities of what was drawn; NaN if they are not known.
    """

    prompts: int
    unanswered: int
    appended: int
    duplicates: int
    unjudged: int
    mean_reward: float
    reward_std: float
    frac_reward_zero_std: float
    mean_length: float
    min_length: int
    max_length: int
    mean_terminated_length: float
    truncated_share: float
    entropy: float
    tokens: int
    seconds: float
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def metrics(self) -> dict[str, float]:
        return {
            "reward": self.mean_reward,
            "reward_std": self.reward_std,
            "frac_reward_zero_std": self.frac_reward_zero_std,
            "completions/mean_length": self.mean_length,
            "completions/min_length": float(self.min_length),
            "completions/max_length": float(self.max_length),
            "completions/mean_terminated_length": self.mean_terminated_length,
            "completions/clipped_ratio": self.truncated_share,
            "rollout/appended": float(self.appended),
            "rollout/duplicates": float(self.duplicates),
            "rollout/unjudged": float(self.unjudged),
            "rollout/unanswered": float(self.unanswered),
            "rollout/entropy": self.entropy,
            "rollout/tokens": float(self.tokens),
            "rollout/tokens_per_second": self.tokens_per_second,
            "rollout/seconds": self.seconds,
        } | {
            f"rewards/{name}/{what}": value
            for name, pair in self.parts.items()
            for what, value in zip(("mean", "std"), pair, strict=True)
        }

    def __str__(self) -> str:
        words = [
            f"{self.appended} trajectories of {self.prompts} prompts "
            f"({self.duplicates} drawn before, {self.unjudged} without a reward)"
        ]
        if not math.isnan(self.mean_reward):
            words.append(f"mean reward {self.mean_reward:.4g}")
        words += [f"{name} {mean:.4g}" for name, (mean, _) in self.parts.items()]
        if self.prompts:
            words += [
                f"mean length {self.mean_length:.1f}",
                f"{self.truncated_share:.1%} truncated",
                f"{self.tokens_per_second:.0f} tokens/s",
            ]
        if self.unanswered:
            words.append(f"{self.unanswered} prompts without completions")
        return ", ".join(words)


@dataclass
class Tally:
    """Adds up what `stats` needs."""

    groups: list[list[float]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    terminated: list[int] = field(default_factory=list)
    logprob_sum: float = 0.0
    logprob_count: int = 0
    appended: int = 0
    duplicates: int = 0
    unjudged: int = 0
    unanswered: int = 0
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add_parts(self, judgements: Sequence[Judgement | None]) -> None:
        """What each of several rewards gave."""
        for judgement in judgements:
            for name, reward in judgement.parts if judgement is not None else ():
                self.parts.setdefault(name, []).append(reward)

    def add_prompt(self, generations: Sequence[Generation], rewards: Sequence[float]) -> None:
        """All completions of a prompt, and the rewards of those that have one."""
        if not generations:
            self.unanswered += 1
            return
        self.groups.append(list(rewards))
        self.unjudged += len(generations) - len(rewards)
        self.lengths += [each.num_policy_tokens for each in generations]
        self.terminated += [each.num_policy_tokens for each in generations if each.finish == "eos"]
        for each in generations:
            self.logprob_sum += math.fsum(each.logprobs or ())  # 0 where another wrote the token
            self.logprob_count += 0 if each.logprobs is None else each.num_policy_tokens

    def stats(self, seconds: float) -> RolloutStats:
        rewards = [reward for group in self.groups for reward in group]
        judged = [group for group in self.groups if group]
        alike = sum(len(set(group)) == 1 for group in judged)
        return RolloutStats(
            prompts=len(self.groups),
            unanswered=self.unanswered,
            appended=self.appended,
            duplicates=self.duplicates,
            unjudged=self.unjudged,
            mean_reward=_mean(rewards),
            reward_std=_std(rewards),
            frac_reward_zero_std=alike / len(judged) if judged else math.nan,
            mean_length=_mean(self.lengths),
            min_length=min(self.lengths, default=0),
            max_length=max(self.lengths, default=0),
            mean_terminated_length=_mean(self.terminated),
            truncated_share=_mean([0.0] * len(self.terminated) + [1.0] * self._truncated()),
            entropy=-self.logprob_sum / self.logprob_count if self.logprob_count else math.nan,
            tokens=sum(self.lengths),
            seconds=seconds,
            parts={name: (_mean(found), _std(found)) for name, found in self.parts.items()},
        )

    def _truncated(self) -> int:
        return len(self.lengths) - len(self.terminated)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """Of a sample, n - 1, as TRL has it; NaN for fewer than two, infinite with a -inf."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    if math.isinf(mean):
        return math.inf
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


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
            new: list[Trajectory] = []
            rewards: list[float] = []
            for each, judgement in zip(group, judgements, strict=True):
                if judgement is not None:
                    ids = tuple(each.token_ids)
                    # Above all draws before, since equal ones of those have numbers below it.
                    draw = call.drawn + seen[ids]
                    new.append(as_trajectory(prompt, each, judgement, origin, sampling, draw))
                    rewards.append(judgement.reward)
                    seen[ids] += 1
            tally.add_prompt(group, rewards)
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
        judged = iter(judge("collect", self._reward, whole, self._decode))
        return [next(judged)[1] if each.token_ids else None for _, each in pairs]


def _first(pair: tuple[int, StoredPrompt]) -> int:
    return pair[0]


def as_trajectory(
    prompt: StoredPrompt,
    generation: Generation,
    judgement: Judgement,
    origin: Origin,
    sampling: Sampling,
    draw: int,
) -> Trajectory:
    """What is stored of a generation. Raises ValueError as `Trajectory` does."""
    turns = generation.turns
    return Trajectory(
        prompt.id,
        generation.token_ids,
        judgement.reward - (0.0 if turns is None else turns.paid),
        origin,
        generation.finish,
        reason=judgement.reason,
        behaviour_logprobs=generation.logprobs,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        draw=draw,
        completion_mask=None if turns is None else turns.completion_mask,
        contexts=None if turns is None else turns.contexts,
        token_rewards=None if turns is None else turns.token_rewards,
        info=None if turns is None else turns.info,
    )
