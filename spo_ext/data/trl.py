"""Rows as TRL's trainers take them: prompt, completion (texts or messages), and a reward.

Besides them a row may have prompt_ids, completion_ids, tests, answer and split, as columns of TRL's
data sets are free. What an exported row knows more stands in its column `spo`, as JSON in text;
tests and answer of such a row are JSON in text too, so that all rows have columns of one type.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from spo_ext.data.records import Completion, Content, Defaults, Record, Row, RowError, parsed, shown
from spo_ext.data.tests import check_form
from spo_ext.store.codec import encode_json
from spo_ext.store.records import Origin, Prompt, StoredPrompt, StoredTrajectory

UNKNOWN = Origin("model", model="unknown")


def parse_trl(row: Row, defaults: Defaults) -> Record:
    """Raises RowError, or ValueError of the records."""
    content, completion = _conversation(row)
    tests = parsed(row, "tests")
    extra = parsed(row, "spo")
    if tests is not None and extra is None:  # An export has what was stored, whoever judges by it.
        check_form(tests)
    if extra is not None and not isinstance(extra, dict):
        raise RowError(f"spo must be an object, got {shown(extra)}")
    prompt = Prompt(
        content,
        token_ids=row.get("prompt_ids"),
        tests=tests,
        answer=row.get("answer") if extra is None else parsed(row, "answer"),
        split=defaults.split or row.get("split") or "train",
    )
    if completion is None and row.get("completion_ids") is None:
        return Record(prompt)
    if completion is not None and isinstance(content, str) != isinstance(completion, str):
        raise RowError("prompt and completion must both be text or both be messages")
    extra = extra or {}
    origin = defaults.origin or _origin(row, extra)
    how = {name: extra[name] for name in _HOW if extra.get(name) is not None}
    ids = row.get("completion_ids")
    item = Completion(completion, _reward(row), origin, token_ids=ids, **how)
    return Record(prompt, (item,))


_HOW = ("finish", "reason", "behaviour_logprobs", "temperature", "top_p")


def trl_row(
    prompt: StoredPrompt, trajectory: StoredTrajectory | None, completion: Content | None
) -> dict[str, Any]:
    """The row that `parse_trl` reads back; completion is what token_ids say, None if unknown."""
    row: dict[str, Any] = {
        "prompt": prompt.content,
        "prompt_ids": None if prompt.token_ids is None else list(prompt.token_ids),
        "completion": completion,
        "completion_ids": None if trajectory is None else list(trajectory.token_ids),
        "reward": None if trajectory is None else trajectory.reward,
        "tests": encode_json(prompt.tests),
        "answer": encode_json(prompt.answer),
        "split": prompt.split,
        "spo": "{}" if trajectory is None else encode_json(_extra(trajectory)),
    }
    return row


def _extra(trajectory: StoredTrajectory) -> dict[str, Any]:
    origin, behaviour = trajectory.origin, trajectory.behaviour_logprobs
    values = {
        "origin": {name: getattr(origin, name) for name in _ORIGIN},
        "finish": trajectory.finish,
        "reason": trajectory.reason,
        "temperature": trajectory.temperature,
        "top_p": trajectory.top_p,
        "behaviour_logprobs": None if behaviour is None else torch.as_tensor(behaviour).tolist(),
    }
    return {name: value for name, value in values.items() if value is not None}


_ORIGIN = ("kind", "run", "policy_version", "model")


def _origin(row: Row, extra: dict[str, Any]) -> Origin:
    given = extra.get("origin")
    if isinstance(given, dict):
        if not set(given) <= set(_ORIGIN) or "kind" not in given:
            raise RowError(f"origin must have the fields {', '.join(_ORIGIN)}, got {shown(given)}")
        return Origin(**given)
    model = row.get("model")
    return Origin("model", model=model) if isinstance(model, str) and model else UNKNOWN


def _conversation(row: Row) -> tuple[Content, Content | None]:
    """Prompt and completion; of `messages` alone, the last is the completion if an assistant's."""
    content, completion = row.get("prompt"), row.get("completion")
    messages = row.get("messages")
    if content is None and isinstance(messages, list) and messages:
        last = messages[-1]
        if len(messages) > 1 and isinstance(last, dict) and last.get("role") == "assistant":
            return messages[:-1], [last]
        return messages, completion
    if not isinstance(content, str | list):
        raise RowError(f"prompt must be text or messages, got {shown(content)}")
    if not isinstance(completion, str | list | None):
        raise RowError(f"completion must be text or messages, got {shown(completion)}")
    return content, completion


def _reward(row: Row) -> float:
    if row.get("reward") is not None:
        reward: float = row["reward"]  # checked by the trajectory
        return reward
    if isinstance(row.get("label"), bool):
        return float(row["label"])
    raise RowError("a completion needs a reward, or a label that is true or false")


def json_line(row: dict[str, Any]) -> bytes:
    """A line of JSONL; a reward of -inf is -Infinity, as Python's json reads and writes it."""
    return json.dumps({k: v for k, v in row.items() if v is not None}).encode() + b"\n"
