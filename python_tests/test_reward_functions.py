"""Columns of prompts as arguments of reward functions, and several rewards with weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rollout_cases import Scripted, decode, words

from spo_ext.data.tests import stdin_tests
from spo_ext.evaluation.evaluate import evaluate
from spo_ext.evaluation.stored import _line, _sample
from spo_ext.rollout import Judgement, Reward, Rollouts, Sampling
from spo_ext.rollout.answers import AnswerReward
from spo_ext.rollout.programs import TestsReward
from spo_ext.rollout.rewards import SumOfRewards, as_reward, judged_by, needs_of
from spo_ext.store import Prompt, StoredPrompt, TrajectoryStore
from spo_ext.store.counts import ids_of_split

A = Prompt("a", answer="1", columns={"level": 3, "tags": ["x", "y"]})
B = Prompt("b", columns={"level": 5})
C = Prompt("c")


def judge(reward: Reward, *prompts: Prompt) -> list[Judgement | None]:
    return reward(prompts, ["1"] * len(prompts), [[1]] * len(prompts))


def rewards(reward: Reward, *prompts: Prompt) -> list[float | None]:
    return [found and found.reward for found in judge(reward, *prompts)]


def level(completions: list[str], level: list[int | None]) -> list[float | None]:
    return [each and float(each) for each in level]


def number_of_tags(completions: list[str], tags: Any = None, **_: Any) -> list[float]:
    return [float(len(each or ())) for each in tags or [None] * len(completions)]


def test_columns_are_arguments_by_their_names() -> None:
    given: dict[str, Any] = {}

    def everything(completions: list[str], **columns: Any) -> list[float]:
        given.update(columns)
        return [0.0] * len(completions)

    judge(as_reward(everything), A, B, C)
    assert given == {
        "prompts": ["a", "b", "c"],
        "completion_ids": [[1]] * 3,
        "answer": ["1", None, None],
        "tests": [None] * 3,
        "level": [3, 5, None],
        "tags": [["x", "y"], None, None],
    }
    assert rewards(as_reward(level), A, B, C) == [3.0, 5.0, None]
    assert rewards(as_reward(number_of_tags), A, B) == [2.0, 0.0]
    assert rewards(as_reward(number_of_tags), B, C) == [0.0, 0.0], "its default"
    assert as_reward(level)([], [], []) == []


def test_a_column_that_no_prompt_of_a_rollout_has_is_named() -> None:
    with pytest.raises(ValueError, match=r"reward level: .*\(they have none\), got level"):
        judge(as_reward(level), C)
    reward = as_reward(level)
    assert list(judged_by(reward, [A, C])) == [A, C]
    assert rewards(reward, C) == [None], "others of the split have it"


def test_a_verl_function_is_written_as_one_of_trl() -> None:
    def compute_score(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Any
    ) -> float:
        return float(solution_str == ground_truth and extra_info["index"] == 7)

    def reward(
        completions: list[str], data_source: Any, answer: Any, extra_info: Any, **_: Any
    ) -> list[float]:
        return [*map(compute_score, data_source, completions, answer, extra_info)]

    columns = {"data_source": "gsm8k", "extra_info": {"index": 7}}
    assert rewards(as_reward(reward), Prompt("a", answer="1", columns=columns)) == [1.0]


def minus(completions: list[str], **_: Any) -> list[float]:
    return [-math.inf] * len(completions)


def nothing(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def half(completions: list[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


@pytest.mark.parametrize(
    ("funcs", "weights", "reward"),
    [
        ([half, half], None, 1.0),
        ([half, level], [2.0, 0.5], 2.5),
        ([half, nothing], [3.0, 1.0], 1.5),
        ([nothing, nothing], None, None),
        ([half, minus], None, -math.inf),
        ([half, minus], [1, 0], 0.5),
        ([half], [4.0], 2.0),
        (half, [4.0], 2.0),
        ("answer", [2.0], 2.0),
        (["answer", half], [1, -1], 0.5),
    ],
)
def test_the_weighted_sum_of_trl(funcs: Any, weights: Any, reward: float | None) -> None:
    assert rewards(as_reward(funcs, weights), A) == [reward]


def test_a_sum_says_what_each_gave() -> None:
    [found] = judge(as_reward([half, level, nothing, half, "answer"], [1, 2, 3, 4, 5]), A)
    assert found is not None and found.reward == 0.5 + 6 + 2 + 5
    assert found.parts == (("half", 0.5), ("level", 3.0), ("half_2", 0.5), ("answer", 1.0))
    assert found.reason == "half 0.5, level 3, half_2 0.5, answer 1"
    [found] = judge(as_reward(["answer", half]), Prompt("a", answer="2"))
    assert found is not None and found.reason == "answer 0 (answer '1', not '2'), half 0.5"


@pytest.mark.parametrize(
    ("funcs", "weights", "match"),
    [
        ([half, half], [1.0], "reward_weights must be 2, one for each of reward_funcs, got 1"),
        (half, [1.0, 2.0], "reward_weights must be 1, .* got 2"),
        ([half], [math.nan], "reward_weights must be a finite number, got nan"),
        ([half, minus], [1, -1], "weighted sum must be finite or -inf, got half 0.5, minus -inf"),
        ([half, "no_such"], None, "reward must be tests, answer, package.module:function"),
    ],
)
def test_sums_that_cannot_be(funcs: Any, weights: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        judge(as_reward(funcs, weights), A)


def test_a_sum_judges_what_one_of_its_rewards_can(tmp_path: Path) -> None:
    program = Prompt("d", tests=stdin_tests(["1"], ["1"]))
    tests, answer = TestsReward(), AnswerReward()
    both = SumOfRewards([tests, answer])
    assert needs_of(both) == ("tests", "answer") and needs_of(SumOfRewards([tests])) == ("tests",)
    assert needs_of(as_reward([tests, half])) == () == needs_of(as_reward(half))
    every = [A, B, program]
    assert list(judged_by(both, every)) == [A, program]
    assert list(judged_by(as_reward([answer, half]), every)) == every
    with TrajectoryStore(tmp_path / "store.db") as store:
        ids = store.add_prompts(every)
        assert ids_of_split(store, "train", needs_of(both)) == [ids[0], ids[2]]
        assert ids_of_split(store, "train", ("answer",)) == ids[:1]
        assert ids_of_split(store, "train") == ids


def test_the_range_of_a_sum() -> None:
    answer = AnswerReward(passed=2.0, failed=-1.0)
    assert SumOfRewards([answer, AnswerReward()], [1, 3]).reward_range == (-1.0, 5.0)
    assert SumOfRewards([answer], [-1]).reward_range == (-2.0, 1.0)
    # Where only one of them may apply, its worst or best may be the sum's.
    apart = SumOfRewards([TestsReward(passed=3.0, failed=2.0), AnswerReward(passed=9, failed=1)])
    assert apart.reward_range == (1.0, 12.0)
    assert as_reward([answer, half]).reward_range is None  # type: ignore[attr-defined]


def test_the_rewards_of_a_rollout_and_of_an_evaluation(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path / "store.db")
    store.add_prompts(words(2, columns={"level": 4}))
    prompts: Sequence[StoredPrompt] = list(store.prompts())
    reward = as_reward([half, level], [1.0, 0.25])
    sampling = Sampling(2)
    how: dict[str, Any] = {"run": "r", "sampling": sampling, "decode": decode}
    stats = Rollouts(store, Scripted(), reward, **how).collect(prompts, 0)
    found = stats.metrics()
    assert found["reward"] == 1.5
    assert found["rewards/half/mean"] == 0.5 and found["rewards/level/mean"] == 4.0
    assert found["rewards/level/std"] == 0.0 and "half 0.5, level 4" in str(stats)
    assert {item.reason for item in store.trajectories()} == {"half 0.5, level 4"}
    result = evaluate(prompts, Scripted(), reward, sampling=sampling, ks=[1], decode=decode)
    assert result.values()["rewards/level/mean"].mean == 4.0
    sample = result.samples[0][0]
    assert _sample(json.loads(json.dumps(_line(prompts[0], sample)))) == sample
