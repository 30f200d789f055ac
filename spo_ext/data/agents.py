"""Logs of agents: rows of verifiers' traces.jsonl, and ATIF, the format of Harbor.

Where a row has token ids they are taken as they were generated; else the messages are rendered turn
by turn. What is not learned from is kept in the trajectory's info.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spo_ext.data.records import (
    MESSAGES,
    Completion,
    Defaults,
    Record,
    Row,
    RowError,
    Turn,
    as_json,
    shown,
)
from spo_ext.data.trl import readable
from spo_ext.store.records import Finish, Origin, Prompt


def parse_verifiers(row: Row, defaults: Defaults) -> Record:
    """A trace of verifiers 0.4: a graph of messages, each path from its root to a leaf a branch.

    The reward is the sum of the weighted ones. What branches have in common is learned once.
    Raises RowError.
    """
    task, agent = _object(row, "task"), _object(row, "agent")
    data = _object(task, "data")
    nodes = row["nodes"]
    if not isinstance(nodes, list) or not nodes:
        raise RowError(f"nodes must be a list of messages, got {shown(nodes)}")
    if row.get("mm_token_type_id_map"):
        raise RowError("mm_token_type_id_map must be empty: images and audio are not stored")
    paths = _paths(nodes)
    messages = [[openai_message(nodes[i]["message"]) for i in path] for path in paths]
    first = next((i for i, n in enumerate(paths[0]) if nodes[n].get("sampled")), None)
    if not first:
        raise RowError("nodes must have a sampled message behind a prompt")
    content = readable("prompt", messages[0][:first])
    calls = row.get("calls") or []
    last = calls[-1] if calls else {}
    sampling = _object(last, "sampling") if last.get("sampling") else {}
    finish: Finish = "truncated"
    if row.get("ok", True) and last.get("finish_reason") != "length" and not row.get("is_timeout"):
        finish = "eos"
    read = [int(t) for n in paths[0][:first] for t in nodes[n].get("token_ids") or ()]
    turns, prompt_ids = None, None
    if any(node.get("token_ids") for node in nodes):
        turns = list(sampled_turns(nodes, paths))
        if not turns:
            raise RowError("nodes must have token_ids that were sampled")
        prompt_ids = turns[0].context
        if list(prompt_ids[: len(read)]) != read:
            raise RowError("the first sampled tokens must follow the prompt's")
    elif len(paths) > 1:
        raise RowError(f"{len(paths)} branches without token_ids cannot be told apart")
    tools = [
        openai_tool(tool) for tool in nodes[paths[0][0]].get("tools") or row.get("tools") or ()
    ]
    named = last.get("model") or _object(agent, "config").get("model")
    origin = defaults.origin or Origin("model", model=str(named or agent.get("name") or "unknown"))
    prompt = Prompt(
        content,
        token_ids=prompt_ids,
        answer=data.get("answer"),
        split=defaults.split_of(row),
        columns={"task": as_json("task", task)} | ({"tools": tools} if tools else {}),
    )
    said = readable("completion", messages[0][first:])
    info = {name: as_json(name, row[name]) for name in row if name not in ("task", "nodes")}
    info["nodes"] = [_without(node, *TOKENS) for node in nodes]
    completion = Completion(
        said,
        _weighted(row.get("rewards")),
        origin,
        finish,
        reason=str(row.get("stop_condition") or ""),
        temperature=sampling.get("temperature"),
        top_p=sampling.get("top_p"),
        info=info | {MESSAGES: said},
        turns=turns,
    )
    return Record(prompt, (completion,))


TOKENS = ("token_ids", "mask", "logprobs")


def _paths(nodes: Sequence[Any]) -> list[list[int]]:
    """From the root to each leaf, in the order of the leaves. Raises RowError."""
    parents: list[int | None] = []
    for i, node in enumerate(nodes):
        parent = node.get("parent") if isinstance(node, Mapping) else i
        if not isinstance(node, Mapping) or not (parent is None or 0 <= parent < i):
            raise RowError(f"nodes[{i}] must have an earlier parent or none, got {shown(node)}")
        if not isinstance(node.get("message"), Mapping):
            raise RowError(f"nodes[{i}] must have a message, got {shown(node.get('message'))}")
        parents.append(parent)
    paths = []
    for leaf in sorted(set(range(len(nodes))) - set(parents)):
        path: list[int] = []
        place: int | None = leaf
        while place is not None:
            path.append(place)
            place = parents[place]
        paths.append(path[::-1])
    return paths


def sampled_turns(nodes: Sequence[Any], paths: Sequence[Sequence[int]]) -> Iterator[Turn]:
    """The sampled tokens of each node once, behind all tokens of its path. Raises RowError."""
    seen: set[int] = set()
    for path in paths:
        read: list[int] = []
        for place in path:
            node = nodes[place]
            ids, mask = list(node.get("token_ids") or ()), list(node.get("mask") or ())
            if len(mask) != len(ids):
                raise RowError(f"nodes[{place}].mask must have {len(ids)} entries, got {len(mask)}")
            logprobs = list(node.get("logprobs") or ())
            if logprobs and len(logprobs) != sum(mask):
                raise RowError(
                    f"nodes[{place}].logprobs must have {sum(mask)} entries, one for each sampled "
                    f"token, got {len(logprobs)}"
                )
            for start, end in [] if place in seen else _runs(mask):
                known, logprobs = logprobs[: end - start] or None, logprobs[end - start :]
                yield Turn([*read, *ids[:start]], ids[start:end], known)
            seen.add(place)
            read += ids


def _runs(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    start = None
    for place, own in enumerate([*mask, False]):
        if own and start is None:
            start = place
        if not own and start is not None:
            yield start, place
            start = None


def _weighted(rewards: Any) -> float:
    if not isinstance(rewards, Mapping) or not rewards or None in rewards.values():
        raise RowError(f"rewards must be scores by name, got {shown(rewards)}: it was not judged")
    return sum(float(one["score"]) * float(one.get("weight", 1.0)) for one in rewards.values())


def openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of verifiers with calls as OpenAI and chat templates have them."""
    plain = {name: value for name, value in message.items() if value is not None}
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in plain["tool_calls"]
        ]
    return plain


def openai_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": _without(tool, "type")}


def parse_atif(row: Row, defaults: Defaults) -> Record:
    """A trajectory of ATIF 1.0 to 1.6.

    The reward, which ATIF has no place for, stands beside its fields as `reward`, or in `extra` or
    `final_metrics.extra`; those of turns in `metrics.extra` or `extra` of a step. Raises RowError.
    """
    agent, steps = _object(row, "agent"), row["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise RowError(f"steps must be a list of objects, got {shown(steps)}")
    spoken = [i for i, step in enumerate(steps) if step.get("source") == "agent"]
    if not spoken or not spoken[0]:
        raise RowError("steps must have one of the agent behind a prompt")
    before = [message for step in steps[: spoken[0]] for message in _messages(step)]
    said = [message for step in steps[spoken[0] :] for message in _messages(step)]
    metrics = [_object(steps[i], "metrics") if steps[i].get("metrics") else {} for i in spoken]
    rewards = [
        _reward_of(one.get("extra"), steps[i].get("extra"))
        for i, one in zip(spoken, metrics, strict=True)
    ]
    turns = _atif_turns(metrics, rewards, [_own(steps[i]) for i in spoken])
    tools = agent.get("tool_definitions")
    reward = row.get("reward")
    if reward is None:
        final = row.get("final_metrics") or {}
        reward = _reward_of(row.get("extra"), final.get("extra"))
    if reward is None:
        raise RowError(
            "ATIF has no place for a reward: put it beside the fields as `reward`, or into "
            "`extra` or `final_metrics.extra`"
        )
    names = {agent.get("model_name"), *(steps[i].get("model_name") for i in spoken)} - {None}
    model = ", ".join(sorted(map(str, names))) or str(agent.get("name") or "unknown")
    completion_of: Any = readable("completion", said)
    info = {name: as_json(name, row[name]) for name in row if name not in ("steps", "reward")}
    info["steps"] = [
        {**_without(step), "metrics": _without(step["metrics"], *_OF_ATIF)}
        if step.get("metrics")
        else _without(step)
        for step in steps
    ]
    paid = [reward or 0.0 for reward in rewards]
    completion = Completion(
        completion_of,
        float(reward),
        defaults.origin or Origin("model", model=model),
        info=info | {MESSAGES: completion_of},
        turns=turns,
        turn_rewards=paid if turns is None and any(paid) else None,
    )
    prompt = Prompt(
        readable("prompt", before),
        token_ids=None if turns is None else turns[0].context,
        split=defaults.split_of(row),
        columns={"tools": as_json("tools", tools)} if tools else None,
    )
    return Record(prompt, (completion,))


_OF_ATIF = ("prompt_token_ids", "completion_token_ids", "logprobs")


def _atif_turns(
    metrics: Sequence[Mapping[str, Any]], rewards: Sequence[float | None], own: Sequence[bool]
) -> list[Turn] | None:
    """None if no step has token ids. Raises RowError if some have not, or not those they read."""
    given = [[one.get(name) is not None for name in _OF_ATIF[:2]] for one in metrics]
    if not any(map(any, given)):
        return None
    if not all(map(all, given)):
        raise RowError(
            "every step of the agent must have prompt_token_ids and completion_token_ids, or none: "
            "tokens would be guessed otherwise"
        )
    return [
        Turn(
            one["prompt_token_ids"],
            one["completion_token_ids"],
            one.get("logprobs"),
            reward or 0.0,
            mine,
        )
        for one, reward, mine in zip(metrics, rewards, own, strict=True)
    ]


def _own(step: Mapping[str, Any]) -> bool:
    """What another trajectory has already is not learned again."""
    return not step.get("is_copied_context")


def _reward_of(*extras: Any) -> float | None:
    for extra in extras:
        if isinstance(extra, Mapping) and extra.get("reward") is not None:
            return float(extra["reward"])
    return None


def _messages(step: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A step as OpenAI's messages: what was said, then what tools answered. Raises RowError."""
    source = step.get("source")
    role = {"system": "system", "user": "user", "agent": "assistant"}.get(str(source))
    if role is None:
        raise RowError(f"the source of a step must be system, user or agent, got {shown(source)}")
    message: dict[str, Any] = {"role": role, "content": step.get("message", "")}
    if step.get("reasoning_content"):
        message["reasoning_content"] = step["reasoning_content"]
    if step.get("tool_calls"):
        message["tool_calls"] = [
            {
                "id": call.get("tool_call_id"),
                "type": "function",
                "function": {"name": call.get("function_name"), "arguments": call.get("arguments")},
            }
            for call in step["tool_calls"]
        ]
    if role == "assistant" and not _own(step):
        message["weight"] = 0
    yield message
    for result in (step.get("observation") or {}).get("results") or ():
        words: dict[str, Any] = {"role": "tool", "content": result.get("content") or ""}
        if result.get("source_call_id") is not None:
            words["tool_call_id"] = result["source_call_id"]
        yield words


def _object(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Raises RowError."""
    value = row.get(name) or {}
    if not isinstance(value, Mapping):
        raise RowError(f"{name} must be an object, got {shown(value)}")
    return value


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: as_json(name, value) for name, value in fields.items() if name not in names}
