"""What a producer needs: something that writes completions, and something that judges them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from spo_ext.checks import check_integer, number, refuse
from spo_ext.store.records import Finish, Prompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn.

    n: completions of each prompt.
    temperature, top_p: > 0, and in (0, 1]; stored with every trajectory.
    max_new_tokens: a completion that reaches it is "truncated".
    seed: two calls with one seed, one policy and the same prompts draw the same completions, where
        the generator promises it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        owner = "Sampling"
        check_integer(owner, "n", self.n, 1)
        number(owner, "temperature", self.temperature, above=0.0)
        number(owner, "top_p", self.top_p, above=0.0, at_most=1.0)
        check_integer(owner, "max_new_tokens", self.max_new_tokens, 1)
        check_integer(owner, "seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class Generation:
    """A completion: token ids as generated, the end token included if there was one.

    logprobs: [T] nats under the policy that drew it at the sampling temperature, before top-p;
        None where the generator does not know them.
    """

    token_ids: tuple[int, ...]
    finish: Finish
    logprobs: tuple[float, ...] | None = None


class Generator(Protocol):
    """Writes completions: a model in this process, or a server."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """For each prompt, in order, `sampling.n` completions, or none of one that it had to leave
        out and has said so. Prompts have token_ids."""
        ...


@dataclass(frozen=True, slots=True)
class Judgement:
    """A reward, finite or -inf, and why (the first failed test, a judge's words).

    parts: of a sum of several rewards each by name, without its weight.
    """

    reward: float
    reason: str = ""
    parts: tuple[tuple[str, float], ...] = ()


Need = Literal["tests", "answer"]
Needs = Need | None


def check_judgements(owner: str, found: object, count: int) -> list[Judgement | None]:
    """What a reward returned. Raises ValueError unless it is as `Reward` says."""
    if not isinstance(found, Sequence) or len(found) != count:
        got = len(found) if isinstance(found, Sequence) else found
        refuse(owner, "reward", f"one that returns {count} judgements", got)
    for judgement in found:
        if judgement is not None and not isinstance(judgement, Judgement):
            expected = "one that returns Judgement or None (FunctionReward takes numbers)"
            refuse(owner, "reward", expected, judgement)
        if judgement is not None and not judgement.reward < math.inf:
            refuse(owner, "reward", "one that returns finite numbers or -inf", judgement.reward)
    return list(found)


class Reward(Protocol):
    """Judges completions.

    One that can judge only prompts with tests, or with an answer, says so by an attribute `needs`
    of type Needs; no completions of other prompts are drawn for it. See `judged_by`.
    """

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        token_ids: Sequence[Sequence[int]],
    ) -> list[Judgement | None]:
        """One judgement for each completion, which is the text without special tokens.

        None: it cannot be judged (no tests, the judge failed), and is not stored.
        """
        ...
