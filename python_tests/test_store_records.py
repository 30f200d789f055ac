"""A record with a mistake is refused when it is made, with words that say which."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from spo_ext.store import Origin, Prompt, PromptValue, Stratum, Trajectory, TrajectoryStore

GOOD: dict[str, Any] = {
    "prompt_id": 1,
    "token_ids": [5, 1],
    "reward": 0.5,
    "origin": Origin("human"),
    "finish": "eos",
}
TRAJECTORIES = [
    ({"prompt_id": "1"}, "prompt_id must be an integer >= 1, got '1'"),
    ({"prompt_id": True}, "prompt_id must be an integer >= 1, got True"),
    ({"token_ids": []}, "token_ids must be at least one token, got ()"),
    ({"token_ids": "ab"}, "token_ids must be a sequence of token ids, got 'ab'"),
    ({"token_ids": [1, -1]}, "token_ids must be token ids in [0, 4294967295], got -1"),
    ({"token_ids": [1.0]}, "token_ids must be token ids in [0, 4294967295], got 1.0"),
    ({"token_ids": torch.ones(2, 2).long()}, "token_ids must be integers [T], got torch.int64"),
    ({"reward": math.nan}, "reward (unless it is -inf) must be a finite number, got nan"),
    ({"reward": math.inf}, "reward (unless it is -inf) must be a finite number, got inf"),
    ({"reward": None}, "reward (unless it is -inf) must be a finite number, got None"),
    ({"origin": "human"}, "origin must be an Origin, got 'human'"),
    ({"finish": "stop"}, "finish must be one of eos, truncated, got 'stop'"),
    ({"reason": 3}, "reason must be text, got 3"),
    ({"behaviour_logprobs": [-1.0]}, "behaviour_logprobs must be [2], one per token, got [1]"),
    ({"behaviour_logprobs": [0, -math.inf]}, "behaviour_logprobs must be finite"),
    ({"behaviour_logprobs": "xy"}, "behaviour_logprobs must be 2 numbers, got 'xy'"),
    ({"temperature": -0.1}, "temperature must be a number >= 0.0, got -0.1"),
    ({"top_p": 0.0}, "top_p must be a number > 0.0 and <= 1.0, got 0.0"),
    ({"top_p": 1.5}, "top_p must be a number > 0.0 and <= 1.0, got 1.5"),
]
OTHERS = [
    (Origin, {"kind": "robot"}, "kind must be one of policy, model, human, got 'robot'"),
    (Origin, {"kind": "policy", "run": "a"}, "policy_version must be given for kind policy"),
    (Origin, {"kind": "policy", "policy_version": 1}, "run must be given for kind policy"),
    (Origin, {"kind": "model"}, "model must be given for kind model, got None"),
    (Origin, {"kind": "human", "model": "m"}, "model must be None for kind human, got 'm'"),
    (Origin, {"kind": "human", "run": "a\0b"}, "run must be text of 1 to 200 characters"),
    (Origin, {"kind": "human", "run": "\ud800"}, "run must be text without lone surrogates"),
    (Prompt, {"content": 3}, "content must be text or a list of messages with a role, got 3"),
    (Prompt, {"content": [{"content": "a"}]}, "content must be text or a list of messages"),
    (Prompt, {"content": "a", "tests": {1, 2}}, "tests must be JSON, got"),
    (Prompt, {"content": "a", "tests": [{1: 2}]}, "tests must be JSON, got the key 1, which is"),
    (Prompt, {"content": "a", "answer": math.nan}, "answer must be JSON, got"),
    (Prompt, {"content": "a", "split": "all"}, "split must be one of train, dev, test, got 'all'"),
    (PromptValue, {"value": 0.0, "n": -1}, "n must be an integer >= 0, got -1"),
    (PromptValue, {"value": -math.inf, "n": 1}, "value must be a finite number, got -inf"),
    (PromptValue, {"value": 0.0, "n": 1, "beta": 0}, "beta must be a number > 0.0, got 0"),
    (Stratum, {"fraction": 0.0}, "fraction must be a number > 0.0 and <= 1.0, got 0.0"),
    (Stratum, {"fraction": 0.5, "low": 1.0, "high": 0.0}, "low must be less than high 0.0, got 1"),
]


@pytest.mark.parametrize(("change", "message"), TRAJECTORIES)
def test_a_wrong_trajectory_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Trajectory: {message}")):
        Trajectory(**{**GOOD, **change})


@pytest.mark.parametrize(("record", "fields", "message"), OTHERS)
def test_a_wrong_record_is_refused(record: Any, fields: dict[str, Any], message: str) -> None:
    if record is PromptValue:
        fields = {"beta": 0.1, "temperature": 1.0, **fields}
    with pytest.raises(ValueError, match=re.escape(f"{record.__name__}: {message}")):
        record(**fields)


def test_tensors_are_taken_as_they_come(tmp_path: Any) -> None:
    with TrajectoryStore(tmp_path / "store.db") as store:
        prompt = store.add_prompt(Prompt("a", token_ids=torch.tensor([3, 4])))
        logprobs = torch.tensor([-0.5, -1.5], dtype=torch.bfloat16, requires_grad=True)
        fields = {"token_ids": torch.tensor([5, 1]), "behaviour_logprobs": logprobs}
        [got] = store.get(store.append([Trajectory(**{**GOOD, **fields, "prompt_id": prompt})]).ids)
        assert store.get_prompts([prompt])[0].token_ids == (3, 4)
        assert got.token_ids == (5, 1)
        assert got.behaviour_logprobs is not None
        assert got.behaviour_logprobs.tolist() == [-0.5, -1.5]


def test_numbers_of_numpy_are_numbers() -> None:
    ids, reward = np.array([5, 1], dtype=np.uint16), np.float32(0.5)
    got = Trajectory(**{**GOOD, "token_ids": ids, "reward": reward, "behaviour_logprobs": -ids / 2})
    assert (got.token_ids, got.reward) == ((5, 1), 0.5)
    assert all(type(token) is int for token in got.token_ids)
