"""What a rollout measured, under the names of TRL's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spo_ext.rollout.generation import Generation, Judgement


@dataclass(frozen=True, slots=True)
class RolloutStats:
    """Of the completions of one call of `Rollouts.collect`.

    prompts: those with completions; unanswered: those without any, which the generator could not
        draw.
    appended, duplicates: trajectories new to the store, and those that it had already, of a
        rollout that was run again. unjudged: completions without a reward, which are not stored.
    reward_*: of the judged ones; NaN if there are none. -inf counts as it is, so that a mean may
        be -inf. *_length: tokens of all completions, the end token included.
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
        self.lengths += [len(each.token_ids) for each in generations]
        self.terminated += [len(each.token_ids) for each in generations if each.finish == "eos"]
        for each in generations:
            self.logprob_sum += math.fsum(each.logprobs or ())
            self.logprob_count += len(each.logprobs or ())

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
