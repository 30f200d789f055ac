"""Rewards by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from spo_ext.rollout.answers import AnswerReward
from spo_ext.rollout.functions import FunctionReward, load_function
from spo_ext.rollout.generation import Needs, Reward
from spo_ext.rollout.programs import TestsReward
from spo_ext.sandbox import Limits
from spo_ext.store.records import Prompt

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


def as_reward(given: Any) -> Reward:
    """The reward that a user gave: a name (see `load_reward`), a Reward, or a function of TRL's
    form, known by its argument `completions` or `completion_ids` beside columns, or by **kwargs.

    A callable that can be called with three arguments and has none of these names, or has one that
    is called token_ids, is taken as a Reward: `f(prompts, completions, token_ids)`.

    Raises ValueError for anything else, such as a list of functions.
    """
    if isinstance(given, str):
        return load_reward(given)
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
            f"or f(prompts, completions, token_ids), got {given!r} ({error})"
        ) from error
    reward: Reward = given
    return reward


def needs_of(reward: Reward) -> Needs:
    """What a prompt must have for this reward to judge its completions; None: nothing."""
    needs: Needs = getattr(reward, "needs", None)
    return needs


def judged_by(reward: Reward, prompts: Iterable[_P]) -> Iterator[_P]:
    """The prompts that have what the reward needs, in a form that it can use."""
    needs = needs_of(reward)
    for prompt in prompts:
        if needs is not None and getattr(prompt, needs) is None:
            continue
        if not (isinstance(reward, TestsReward) and reward.unusable(prompt)):
            yield prompt


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
