"""Rows as TRL's trainers take them: prompt, completion (texts or messages), and a reward.

Besides them a row may have prompt_ids, completion_ids, tests, answer and split; all other columns
are kept with the prompt, as TRL gives them to reward functions, and tools and chat_template_kwargs
go to the chat template. A completion may be messages of several turns, those of tools and users
among them, or token ids with completion_mask (or a name of `MASKS`), which says what the policy
wrote; turn_rewards has one for each message of the assistant. What an exported row knows more
stands in its column `spo`, as JSON in text; tests and answer of such a row are JSON in text too, so
that all rows have columns of one type, and so are the columns that `spo` names in "json".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from spo_ext.data.records import Completion, Content, Defaults, Record, Row, RowError, parsed, shown
from spo_ext.data.tests import check_given
from spo_ext.store.codec import encode_json
from spo_ext.store.records import Origin, Prompt, StoredPrompt, StoredTrajectory

UNKNOWN = Origin("model", model="unknown")


def parse_trl(row: Row, defaults: Defaults) -> Record:
    """Raises RowError, or ValueError of the records."""
    extra = parsed(row, "spo")
    if extra is not None and not isinstance(extra, dict):
        raise RowError(f"spo must be an object, got {shown(extra)}")
    exported = extra is not None  # What was stored is stored again, whoever judges by it.
    tests, answer = parsed(row, "tests"), row.get("answer")
    content, completions, notes = _conversation(row, exported)
    if exported:
        answer = parsed(row, "answer")
    else:
        content = readable("prompt", content)
        if tests is not None:
            check_given(tests)
        if answer in ([], {}) or (isinstance(answer, str) and not answer.strip()):
            raise RowError("answer must not be blank: no completion could be judged by it")
    prompt = Prompt(
        content,
        token_ids=row.get("prompt_ids"),
        tests=tests,
        answer=answer,
        split=defaults.split_of(row),
        columns={
            **(_decoded(row, extra or {}) or {}),
            **({} if exported else _template(row, content)),
        }
        or None,
    )
    ids = row.get("completion_ids") if len(completions) < 2 else None
    if not completions and ids is None:
        _need_ids(row)
        return Record(prompt)
    origin = _origin(row, extra, defaults)
    how = {name: extra[name] for name in _HOW if extra.get(name) is not None} if extra else {}
    if "contexts" in how:
        how["contexts"] = _contexts(how["contexts"])
    if ids is None:
        _need_ids(row)
    else:
        how["completion_mask"] = _mask(row, len(ids))
        turns = [len(said) for said, _ in completions if not isinstance(said, str)]
        if turns and turns[0] > 1 and how["completion_mask"] is None and not exported:
            raise RowError(
                "completion_ids of several turns must come with a completion_mask, or tokens of "
                "tools and users would be learned as the policy's own"
            )
    if row.get("turn_rewards") is not None:
        how["turn_rewards"] = _turn_rewards(row, completions, ids)
    if not completions:
        return Record(prompt, (Completion(None, _reward(row), origin, token_ids=ids, **how),))
    items = tuple(
        Completion(
            completion, _reward(row) if reward is None else reward, origin, token_ids=ids, **how
        )
        for completion, reward in completions
    )
    return Record(prompt, items, notes=notes)


# What TRL, verl and others call a mask of the tokens that the policy wrote.
MASKS = (
    "completion_mask",
    "env_mask",
    "tool_mask",
    "response_mask",
    "assistant_masks",
    "assistant_mask",
    "loss_mask",
)


def _mask(row: Row, size: int) -> list[bool] | None:
    """Of the completion; one may be of prompt and completion together. Raises RowError."""
    names = [name for name in MASKS if row.get(name) is not None]
    if not names:
        return None
    if len(names) > 1:
        raise RowError(f"a row must have one mask of its tokens, got {', '.join(names)}")
    [name], mask = names, parsed(row, names[0])
    if not isinstance(mask, list) or not all(one in (0, 1) for one in mask):
        raise RowError(f"{name} must be a list of 0 and 1, got {shown(mask)}")
    before = len(mask) - size
    if before == len(row.get("prompt_ids") or ()) and not any(mask[:before]):
        mask = mask[before:]
    if len(mask) != size:
        raise RowError(f"{name} must have one entry for each of {size} tokens, got {len(mask)}")
    return list(map(bool, mask))


def _need_ids(row: Row) -> None:
    for name in MASKS:
        if row.get(name) is not None:
            raise RowError(f"{name} is of token ids, and the row has no completion_ids")


def _turn_rewards(row: Row, completions: Any, ids: Any) -> list[float]:
    """Raises RowError."""
    rewards = parsed(row, "turn_rewards")
    if not isinstance(rewards, list) or not all(isinstance(one, int | float) for one in rewards):
        raise RowError(f"turn_rewards must be a list of numbers, got {shown(rewards)}")
    if ids is not None or len(completions) != 1 or isinstance(completions[0][0], str):
        raise RowError("turn_rewards must come with a completion of messages, without its ids")
    return rewards


def _template(row: Row, content: Content) -> dict[str, Any]:
    """The columns that the chat template gets. Raises RowError."""
    found: dict[str, Any] = {}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value: Any = parsed(row, name)
        if value is None or value in ([], {}):
            continue
        if not isinstance(value, kind):
            raise RowError(f"{name} must be a {kind.__name__}, got {shown(value)}")
        if isinstance(content, str):
            raise RowError(f"{name} is for a chat template, and the prompt is text")
        found[name] = value
    taken = sorted(found.get("chat_template_kwargs", {}).keys() & _OURS)
    if taken:
        raise RowError(f"chat_template_kwargs must be without {', '.join(taken)}, which are ours")
    return found


_OURS = {"tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}


def _contexts(given: Any) -> dict[int, Any]:
    """As `_extra` wrote them: JSON has text for keys. Raises RowError."""
    if not isinstance(given, dict) or not all(key.isdecimal() for key in given):
        raise RowError(f"spo.contexts must be token ids by place, got {shown(given)}")
    return {int(key): ids for key, ids in given.items()}


def readable(name: str, content: Content) -> Content:
    """Text, or messages whose contents are text. Raises RowError for images, audio and the like."""
    if isinstance(content, str):
        return content
    return [_plain_message(name, message) for message in content]


def _plain_message(name: str, message: Any) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message  # The record checks it.
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"{name} must be text, got a part of type {shown(kind)}: images and audio are not "
                "stored, and the policy would not see them"
            )
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


def _spoken(name: str, completion: Content) -> Content:
    """Text, or messages that begin with one of the assistant. Raises RowError."""
    if isinstance(completion, str):
        return completion
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in completion]
    if not roles or roles[0] != "assistant" or None in roles:
        got = ", ".join(map(str, roles)) or "none"
        raise RowError(f"{name} must be messages that begin with the assistant's, got {got}")
    return readable(name, completion)


_HOW = (
    "finish",
    "reason",
    "behaviour_logprobs",
    "temperature",
    "top_p",
    "draw",
    "contexts",
    "token_rewards",
    "info",
)


def trl_row(
    prompt: StoredPrompt,
    trajectory: StoredTrajectory | None,
    completion: Content | None,
    as_text: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The row that `parse_trl` reads back; completion is what token_ids say, None if unknown.

    The columns as_text are written as JSON in text.
    """
    columns = prompt.columns or {}
    extra = {} if trajectory is None else _extra(trajectory)
    if as_text & columns.keys():
        extra["json"] = sorted(as_text & columns.keys())
    return {
        "prompt": prompt.content,
        "prompt_ids": None if prompt.token_ids is None else list(prompt.token_ids),
        "completion": completion,
        "completion_ids": None if trajectory is None else list(trajectory.token_ids),
        "completion_mask": _written(trajectory),
        "reward": None if trajectory is None else trajectory.reward,
        "tests": encode_json(prompt.tests),
        "answer": encode_json(prompt.answer),
        "split": prompt.split,
        "spo": encode_json(extra),
        **{
            name: encode_json(value) if name in as_text else value
            for name, value in columns.items()
        },
    }


def _extra(trajectory: StoredTrajectory) -> dict[str, Any]:
    origin, behaviour = trajectory.origin, trajectory.behaviour_logprobs
    paid, contexts = trajectory.token_rewards, trajectory.contexts
    values = {
        "origin": {name: getattr(origin, name) for name in _ORIGIN},
        "finish": trajectory.finish,
        "reason": trajectory.reason,
        "temperature": trajectory.temperature,
        "top_p": trajectory.top_p,
        "draw": trajectory.draw or None,
        "behaviour_logprobs": None if behaviour is None else torch.as_tensor(behaviour).tolist(),
        "contexts": None if contexts is None else {str(k): list(v) for k, v in contexts.items()},
        "token_rewards": None if paid is None else torch.as_tensor(paid).tolist(),
        "info": trajectory.info,
    }
    return {name: value for name, value in values.items() if value is not None}


def _written(trajectory: StoredTrajectory | None) -> list[int] | None:
    mask = None if trajectory is None else trajectory.completion_mask
    return None if mask is None else list(map(int, mask))


_ORIGIN = ("kind", "run", "policy_version", "model")


def _origin(row: Row, extra: dict[str, Any] | None, defaults: Defaults) -> Origin:
    if extra is None:
        model = row.get("model")
        named = isinstance(model, str) and model
        return defaults.origin or (Origin("model", model=model) if named else UNKNOWN)
    given = extra.get("origin")
    if defaults.origin is not None or not isinstance(given, dict):
        return defaults.origin or UNKNOWN
    if not set(given) <= set(_ORIGIN) or "kind" not in given:
        raise RowError(f"origin must have the fields {', '.join(_ORIGIN)}, got {shown(given)}")
    return Origin(**given)


def _decoded(row: Row, extra: dict[str, Any]) -> dict[str, Any] | None:
    """Columns that an export to Parquet wrote as JSON in text. Raises RowError."""
    names = extra.get("json") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RowError(f"spo.json must be a list of columns, got {shown(names)}")
    return {name: parsed(row, name) for name in names if row.get(name) is not None} or None


def _conversation(
    row: Row, exported: bool
) -> tuple[Content, list[tuple[Content, float | None]], tuple[str, ...]]:
    """Prompt, completions, each with a reward if its place says it, and notes.

    Of `messages` alone, the completion is what begins with the first of the assistant.
    """
    content: Any = row.get("prompt")
    if not exported and (row.get("chosen") is not None or row.get("rejected") is not None):
        return _preference(row, content)
    if content is None:
        messages = row.get("messages")
        if isinstance(messages, list) and messages:
            roles = [m.get("role") if isinstance(m, Mapping) else None for m in messages]
            replies = [i for i, role in enumerate(roles) if i and role == "assistant"]
            asked = [i for i in replies if "user" in roles[:i]]
            if replies:
                first = (asked or replies)[0]
                return messages[:first], [(_spoken("messages", messages[first:]), None)], ()
            content = messages
    if not isinstance(content, str | list):
        raise RowError(f"prompt must be text or messages, got {shown(content)}")
    completion = row.get("completion")
    if completion is None:
        return content, [], ()
    if not isinstance(completion, str | list):
        raise RowError(f"completion must be text or messages, got {shown(completion)}")
    if isinstance(content, str) != isinstance(completion, str):
        raise RowError("prompt and completion must both be text or both be messages")
    return content, [(_spoken("completion", completion), None)], ()


def _preference(
    row: Row, content: Any
) -> tuple[Content, list[tuple[Content, float | None]], tuple[str, ...]]:
    """Rewards 1 and 0, as TRL's unpair_preference_dataset makes labels of the two."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(content, list):
        same = 0  # They begin with the prompt.
        for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
            if one != other:
                break
            same += 1
        content, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    elif not isinstance(chosen, type(content)) or not isinstance(rejected, type(content)):
        content = None
    if not content or not isinstance(content, str | list):
        raise RowError(
            "chosen and rejected must have a prompt of their kind, text or messages, or be "
            "conversations that begin alike"
        )
    assert chosen is not None and rejected is not None  # They are of the prompt's type.
    completions: list[tuple[Content, float | None]] = [
        (_spoken("chosen", chosen), 1.0),
        (_spoken("rejected", rejected), 0.0),
    ]
    return content, completions, ("chosen gets reward 1, rejected 0",)


def _reward(row: Row) -> float:
    reward = row.get("reward")
    if reward is not None:
        return reward  # type: ignore[no-any-return]  # checked by the trajectory
    label = row.get("label")
    if isinstance(label, bool):
        return float(label)
    raise RowError(
        "a completion needs a reward, or a label that is true or false: rows for supervised "
        "training say neither"
    )


def json_line(row: dict[str, Any]) -> bytes:
    """A line of JSONL; a reward of -inf is -Infinity, as Python's json reads and writes it."""
    return json.dumps({k: v for k, v in row.items() if v is not None}).encode() + b"\n"
