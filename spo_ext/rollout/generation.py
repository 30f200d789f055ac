"""What a producer needs: seeded draws of tokens, a writer of completions, a judge of them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from spo_ext.checks import check_integer, number, refuse
from spo_ext.data.records import Turn, join
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
class Judgement:
    """A reward, finite or -inf, and why (the first failed test, a judge's words).

    parts: of a sum of several rewards each by name, without its weight.
    """

    reward: float
    reason: str = ""
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Turns:
    """What a generation is besides its tokens where an environment answered the policy.

    completion_mask, contexts, token_rewards, info: as in `Trajectory`, checked there.
    judgement: of the return, which is the sum of all rewards; None: it cannot be judged, and is
        not stored.
    """

    completion_mask: tuple[bool, ...]
    judgement: Judgement | None
    contexts: Mapping[int, Sequence[int]] | None = None
    token_rewards: tuple[float, ...] | None = None
    info: Any = None

    @property
    def paid(self) -> float:
        """Sum of the rewards on the way."""
        return math.fsum(self.token_rewards or ())


@dataclass(frozen=True, slots=True)
class Generation:
    """A completion: token ids as generated, the end token included if there was one.

    logprobs: [T] nats under the policy that drew it at the sampling temperature, before top-p;
        None where the generator does not know them.
    turns: of several turns of the policy and an environment, which judged them; None: the policy
        wrote all, and a `Reward` judges it.
    """

    token_ids: tuple[int, ...]
    finish: Finish
    logprobs: tuple[float, ...] | None = None
    turns: Turns | None = None

    @property
    def num_policy_tokens(self) -> int:
        """How many of token_ids the policy wrote."""
        return len(self.token_ids) if self.turns is None else sum(self.turns.completion_mask)

    @classmethod
    def of_turns(
        cls,
        prompt_ids: Sequence[int],
        turns: Sequence[Turn],
        finish: Finish,
        judgement: Judgement | None,
        info: Any,
    ) -> Generation:
        """Several turns as one generation; raises RowError where they do not follow each other."""
        written = join(prompt_ids, turns)
        known, paid = written["behaviour_logprobs"], written["token_rewards"]
        return cls(
            tuple(written["token_ids"]),
            finish,
            None if known is None else tuple(known),
            Turns(
                tuple(written["completion_mask"]),
                judgement,
                written["contexts"] or None,
                tuple(paid) if any(paid) else None,
                info,
            ),
        )


class Generator(Protocol):
    """Writes completions: a model in this process, or a server."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """For each prompt, in order, `sampling.n` completions, or none of one that it had to leave
        out and has said so. Prompts have token_ids."""
        ...


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


def judge(
    owner: str,
    reward: Reward,
    pairs: Sequence[tuple[Prompt, Generation]],
    decode: Callable[[Sequence[int]], str],
) -> list[tuple[str, Judgement | None]]:
    """Of each prompt and its completion the text and the judgement: the environment's where it
    answered, else the reward's. Raises what the reward raises, and ValueError unless it returns
    what it should."""
    texts = [decode(each.token_ids) for _, each in pairs]
    plain = [i for i, (_, each) in enumerate(pairs) if each.turns is None]
    found = reward(
        [pairs[i][0] for i in plain],
        [texts[i] for i in plain],
        [pairs[i][1].token_ids for i in plain],
    )
    judged = iter(check_judgements(owner, found, len(plain)))
    return [
        (text, next(judged) if each.turns is None else each.turns.judgement)
        for text, (_, each) in zip(texts, pairs, strict=True)
    ]


# The largest uniform number used: times any sum of weights it stays below that sum.
_BELOW_ONE = 1.0 - 2.0**-32


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) for each list of integers and texts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def completion_seeds(seed: int, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """A seed for each of n completions of each prompt; a prompt that comes twice has others."""
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for ids in map(tuple, prompts):
        seeds.append([derived_seed(seed, ids, seen[ids], k) for k in range(n)])
        seen[ids] += 1
    return seeds


class Draw:
    """Draws tokens, and keeps their log-probabilities.

    Args:
        seeds: [B], one for each row.
        temperature, top_p, length: of the sampling; length is the largest number of tokens.

    `take` is for a loop of one's own. Inside `model.generate` it is a logits processor of greedy
    decoding, which leaves one token possible, the drawn one. Memory is O(B V) for a step and O(B)
    for what it keeps of it.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, length: int) -> None:
        numbers = [
            torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self._uniforms = torch.stack(numbers, 1).clamp(max=_BELOW_ONE)  # [T, B]
        self._temperature = temperature
        self._top_p = top_p
        self._logprobs: list[Tensor] = []

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [B, V] logits."""
        tokens = self.take(scores, torch.arange(len(scores), device=scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def take(self, scores: Tensor, rows: Tensor) -> Tensor:
        """int64 [n]: the next token of each of these rows, from its logits, [n, V]."""
        # On a GPU generate looks for the end late, and may ask for a step too many.
        step = min(len(self._logprobs), len(self._uniforms) - 1)
        logprobs = (scores.float() / self._temperature).log_softmax(-1)
        uniforms = self._uniforms[step].to(scores.device)
        tokens = pick(nucleus(logprobs.exp(), self._top_p), uniforms[rows])
        taken = logprobs.gather(1, tokens[:, None]).squeeze(1)
        self._logprobs.append(taken.new_zeros(len(uniforms)).index_copy_(0, rows, taken))
        return tokens

    def logprobs(self) -> Tensor:
        """float32 [B, T] on the CPU: of each token at the temperature, before top-p."""
        return torch.stack(self._logprobs, 1).cpu()


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[B, V]: 0 but for the fewest likeliest tokens that have at least top_p together."""
    if top_p == 1.0:
        return probabilities
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    kept[:, 0] = ordered[:, 0]  # whatever rounding did
    return torch.zeros_like(probabilities).scatter_(1, tokens, kept)


def pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[B] token ids, each with a share of its weight; weights [B, V] >= 0, uniforms [B] in [0, 1).

    In float64: the sum of 150,000 float32 would round away the tail.
    """
    sums = weights.double().cumsum(-1)
    target = uniforms[:, None] * sums[:, -1:]
    # The first sum above the target: never a token without weight, which adds nothing.
    found = torch.searchsorted(sums, target, right=True).squeeze(1)
    return found.clamp(max=weights.shape[1] - 1)  # only NaN gets there, and is refused later
