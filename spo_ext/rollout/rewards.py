"""Rewards by name."""

from __future__ import annotations

import math
from typing import Any

from spo_ext.rollout.answers import AnswerReward
from spo_ext.rollout.functions import FunctionReward, load_function
from spo_ext.rollout.generation import Reward
from spo_ext.rollout.programs import TestsReward
from spo_ext.sandbox import Limits


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


def test_options(workers: int | None, seconds: float | None) -> dict[str, Any]:
    """Options of "tests" from --sandbox-workers and --test-seconds. Raises ValueError."""
    if seconds is None:
        return {"workers": workers}
    if not 0 < seconds < math.inf:
        raise ValueError(f"--test-seconds must be a number > 0, got {seconds}")
    # Twice the time on the clock: the machine may be busy with other programs.
    limits = Limits(cpu_seconds=math.ceil(seconds), wall_seconds=2 * seconds)
    return {"workers": workers, "limits": limits}
