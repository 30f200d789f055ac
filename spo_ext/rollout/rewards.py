"""Rewards by name, and sums of several."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import nn

from spo_ext.checks import number
from spo_ext.environments.worker import load
from spo_ext.rollout.answers import AnswerReward
from spo_ext.rollout.generation import Judgement, Need, Reward, check_judgements
from spo_ext.rollout.programs import TestsReward
from spo_ext.sandbox import Limits
from spo_ext.store.records import RESERVED, Prompt

_ARGUMENTS = ("prompts", "completions", "completion_ids", "answer", "tests")


class FunctionReward:
    """Reward of `f(prompts, completions, completion_ids, answer, tests, **columns)`, which returns
    a list of numbers or None.

    The function takes those of the arguments that it names, all of them with **kwargs; each is a
    list with an entry for every completion. Columns are those of the prompts, None where a prompt
    has not got one. It may be async. Where the prompt has messages, so has the completion. None or
    NaN leaves a completion without judgement.

    Raises ValueError if the function asks for a column that no prompt has, or for anything else,
    or returns something else.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._function, self._name = function, name
        self.name = str(getattr(function, "__name__", name))  # in metrics
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._named = {p.name for p in named}
        others = [p for p in parameters if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
        self._required = {p.name for p in named if p.default is p.empty} - set(_ARGUMENTS)
        self._refuse([*(p.name for p in others), *sorted(self._required & RESERVED)], "their names")
        self._takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self._seen: set[str] = set()

    def look(self, prompts: Iterable[Prompt]) -> None:
        """At all prompts of a rollout: a column that some have is None for the others."""
        for prompt in prompts:
            self._seen.update(prompt.columns or ())

    def _refuse(self, wrong: Sequence[str], columns: str) -> None:
        if wrong:
            raise ValueError(
                f"reward {self._name}: its arguments must be among {', '.join(_ARGUMENTS)} and "
                f"columns of the prompts ({columns}), got {', '.join(wrong)}"
            )

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        token_ids: Sequence[Sequence[int]],
    ) -> list[Judgement | None]:
        if not prompts:
            return []
        self.look(prompts)
        known = ", ".join(sorted(self._seen)) or "they have none"
        self._refuse(sorted(self._required - self._seen), known)
        every: dict[str, list[Any]] = {
            name: [(prompt.columns or {}).get(name) for prompt in prompts]
            for name in sorted(self._seen)
        }
        every |= {
            "prompts": [prompt.content for prompt in prompts],
            "completions": [
                text
                if isinstance(prompt.content, str)
                else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, completions, strict=True)
            ],
            "completion_ids": [list(ids) for ids in token_ids],
            "answer": [prompt.answer for prompt in prompts],
            "tests": [prompt.tests for prompt in prompts],
        }
        found = self._rewards(
            {name: every[name] for name in every if self._takes_all or name in self._named}
        )
        if len(found) != len(prompts):
            raise ValueError(
                f"reward {self._name}: must return {len(prompts)} rewards, got {len(found)}"
            )
        return [self._judgement(value) for value in found]

    def _rewards(self, arguments: dict[str, list[Any]]) -> list[Any]:
        try:
            rewards = self._function(**arguments)
            if inspect.isawaitable(rewards):
                rewards = _result(rewards)
            if not isinstance(rewards, Iterable):
                raise ValueError(f"reward {self._name}: must return a list, got {rewards!r}")
            return list(rewards)
        except SystemExit as end:  # It would end the command as if all were done.
            raise ValueError(f"reward {self._name}: called sys.exit({end.code!r})") from end

    def _judgement(self, value: Any) -> Judgement | None:
        if value is None:
            return None
        try:
            reward = float(value)
        except (TypeError, ValueError):
            reward = math.inf
        if reward == math.inf:
            raise ValueError(
                f"reward {self._name}: must be finite numbers, -inf or None, got {value!r}"
            )
        return None if math.isnan(reward) else Judgement(reward)


def load_function(name: str) -> Callable[..., Any]:
    """The function of "package.module:function", "package.module.function" or "file.py:function".

    Raises ValueError if there is none, and whatever importing its module raises.
    """
    module, colon, attribute = name.rpartition(":")
    if not colon:
        module, _, attribute = name.rpartition(".")
    if not module or not attribute:
        raise ValueError(
            "reward must be tests, answer, package.module:function or file.py:function, "
            f"got {name!r}"
        )
    try:
        found = load(f"{module}:{attribute}")
    except ValueError as error:
        raise ValueError(f"reward {error}") from error
    if not callable(found):
        raise ValueError(f"reward {name!r} must be a function, got {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def _result(awaitable: Awaitable[Any]) -> Any:
    """In a thread of its own: the caller's may run a loop already, as a notebook's does."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(wait())).result()


_P = TypeVar("_P", bound=Prompt)


def load_reward(name: str, **options: Any) -> Reward:
    """The reward that a name stands for.

    name: "tests" (options of TestsReward), "answer" (options of AnswerReward), or a function of
        TRL's form without options: "package.module:function", "package.module.function",
        "path/file.py:function".

    Raises ValueError for a name or an option that there is not.
    """
    kinds = {"tests": TestsReward, "answer": AnswerReward}
    if name in kinds:
        try:
            reward: Reward = kinds[name](**options)
        except TypeError as error:
            raise ValueError(f"load_reward: options of {name}: {error}") from None
        return reward
    if options:
        raise ValueError(
            f"load_reward: options must be none for the function {name}, got {sorted(options)}"
        )
    return FunctionReward(load_function(name), name)


class SumOfRewards:
    """Of each completion the sum of what several rewards give it, times their weights.

    As in TRL, a reward of None is one that does not apply, and counts as 0; a completion that none
    applies to is not judged. The reason says what each gave.

    Args:
        weights: one for each reward, finite; None: 1 for all.

    Raises ValueError.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        if not rewards:
            raise ValueError("rewards: reward_funcs must be at least one, got none")
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(weights) != len(rewards):
            raise ValueError(
                f"rewards: reward_weights must be {len(rewards)}, one for each of reward_funcs, "
                f"got {len(weights)}"
            )
        self.rewards = tuple(rewards)
        self._weights = [number("rewards", "reward_weights", weight) for weight in weights]
        self._names: list[str] = []
        for reward in rewards:
            name, again = _name_of(reward), 1
            while (unique := name if again == 1 else f"{name}_{again}") in self._names:
                again += 1
            self._names.append(unique)
        needs = {needs_of(reward) for reward in rewards}
        self.needs: tuple[Need, ...] = ()  # of which a prompt must have one
        if () not in needs:
            self.needs = tuple(dict.fromkeys(need for each in rewards for need in needs_of(each)))

    @property
    def reward_range(self) -> tuple[float, float] | None:
        """If all of them know theirs."""
        ends = []
        for reward, weight in zip(self.rewards, self._weights, strict=True):
            pair: tuple[float, float] | None = getattr(reward, "reward_range", None)
            if pair is None:
                return None
            ends.append(sorted(weight * end for end in pair))
        if len({needs_of(reward) for reward in self.rewards}) == 1:  # All apply, or none.
            return sum(low for low, _ in ends), sum(high for _, high in ends)
        low = sum(low for low, _ in ends if low < 0) or min(low for low, _ in ends)
        return low, sum(high for _, high in ends if high > 0) or max(high for _, high in ends)

    def look(self, prompts: Iterable[Prompt]) -> None:
        """See `FunctionReward.look`."""
        prompts = list(prompts)
        for reward in self.rewards:
            look_at(reward, prompts)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        token_ids: Sequence[Sequence[int]],
    ) -> list[Judgement | None]:
        count = len(completions)
        found = [
            check_judgements(name, reward(prompts, completions, token_ids), count)
            for name, reward in zip(self._names, self.rewards, strict=True)
        ]
        return [self._sum(row) for row in zip(*found, strict=True)]

    def _sum(self, judgements: Sequence[Judgement | None]) -> Judgement | None:
        total, parts, reasons = 0.0, [], []
        for name, weight, judgement in zip(self._names, self._weights, judgements, strict=True):
            if judgement is not None:
                total += weight * judgement.reward if weight else 0.0  # also of -inf
                parts.append((name, judgement.reward))
                why = f" ({judgement.reason})" if judgement.reason else ""
                reasons.append(f"{name} {judgement.reward:g}{why}")
        if not parts:
            return None
        if not total < math.inf:
            raise ValueError(
                f"rewards: their weighted sum must be finite or -inf, got {', '.join(reasons)}"
            )
        return Judgement(total, ", ".join(reasons), tuple(parts))

    def close(self) -> None:
        for reward in self.rewards:
            getattr(reward, "close", lambda: None)()


def _name_of(reward: Reward) -> str:
    """As TRL's metrics name it."""
    kinds: dict[type, str] = {TestsReward: "tests", AnswerReward: "answer"}
    own = getattr(reward, "name", None) or getattr(reward, "__name__", None)
    return kinds.get(type(reward)) or str(own or type(reward).__name__)


def look_at(reward: Reward, prompts: Iterable[Prompt]) -> None:
    """Tells the reward of all prompts that it will judge, if it asks."""
    look = getattr(reward, "look", None)
    if look is not None:
        look(prompts)


def as_reward(given: Any, weights: Sequence[float] | None = None) -> Reward:
    """The reward that a user gave: a name (see `load_reward`), a Reward, a function of TRL's form,
    known by its argument `completions` or `completion_ids` beside columns, or by **kwargs; or a
    list of these, whose sum with the weights it is.

    A callable that can be called with three arguments and has none of these names, or has one that
    is called token_ids, is taken as a Reward: `f(prompts, completions, token_ids)`.

    Raises ValueError for anything else.
    """
    if isinstance(given, list | tuple):
        rewards = [as_reward(each) for each in given]
        return (
            rewards[0] if len(rewards) == 1 and weights is None else SumOfRewards(rewards, weights)
        )
    if weights is not None:
        return SumOfRewards([as_reward(given)], weights)
    if isinstance(given, str):
        return load_reward(given)
    if isinstance(given, nn.Module):
        raise ValueError(
            "SPOTrainer: reward must not be a model: give a function that calls it, "
            f"got {type(given).__name__}"
        )
    name = getattr(given, "__name__", type(given).__name__)
    try:
        signature = inspect.signature(given)
        parameters = signature.parameters
        by_keyword = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        if "token_ids" not in parameters and (
            by_keyword or {"completions", "completion_ids"} & set(parameters)
        ):
            return FunctionReward(given, name)
        signature.bind((), (), ())
    except TypeError as error:
        raise ValueError(
            "SPOTrainer: reward must be a name, a function of TRL's form f(completions, **kwargs), "
            f"f(prompts, completions, token_ids), or a list of these, got {given!r} ({error})"
        ) from error
    reward: Reward = given
    return reward


def needs_of(reward: Reward) -> tuple[Need, ...]:
    """Of what a prompt must have one for this reward to judge its completions; (): nothing."""
    needs: Any = getattr(reward, "needs", None)
    return needs if isinstance(needs, tuple) else (needs,) if needs is not None else ()


def named_split(split: str, reward: Reward) -> str:
    """For messages: the split, and what its prompts must have."""
    needs = needs_of(reward)
    return f"{split} with {' or '.join(needs)}" if needs else split


def judged_by(reward: Reward, prompts: Iterable[_P]) -> Iterator[_P]:
    """The prompts that have what the reward needs, in a form that it can use."""
    for prompt in prompts:
        look_at(reward, [prompt])
        if _judges(reward, prompt):
            yield prompt


def _judges(reward: Reward, prompt: Prompt) -> bool:
    if isinstance(reward, SumOfRewards):
        return any([_judges(each, prompt) for each in reward.rewards])
    needs = needs_of(reward)
    if needs and all(getattr(prompt, need) is None for need in needs):
        return False
    return not (isinstance(reward, TestsReward) and reward.unusable(prompt))


def test_options(
    workers: int | None, seconds: float | None, packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Options of "tests" from --sandbox-workers, --test-seconds and --sandbox-packages.

    Raises ValueError.
    """
    options: dict[str, Any] = {"workers": workers, "packages": packages}
    if seconds is None:
        return options
    if not 0 < seconds < math.inf:
        raise ValueError(f"--test-seconds must be a number > 0, got {seconds}")
    return options | {"limits": Limits(cpu_seconds=seconds, wall_seconds=2 * seconds)}
