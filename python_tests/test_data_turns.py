"""Agents' logs: who wrote which token, and that nothing of them is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from data_cases import contents, import_rows, write_rows
from test_data_tokens import phi

from spo_ext.data.exporter import export_rows
from spo_ext.data.formats import parse_row
from spo_ext.data.records import Defaults, RowError, Turn, join
from spo_ext.data.tokens import Tokenizer
from spo_ext.store import TrajectoryStore

# As Qwen's: calls and tools are rendered, and reasoning is dropped once the user speaks again.
CHAT = (
    "{% if tools %}<|user|>tools {{ tools | tojson }}<|end|>{% endif %}"
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content and loop.index0 > last.user %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}]{% endfor %}<|end|>\n"
    "{% else %}<|user|>{{ m.role }}: {{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = [{"role": "user", "content": "2+2?"}]
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "4"}
SAID = {"role": "assistant", "content": "It is 4.", "reasoning_content": "easy"}
MORE = {"role": "user", "content": "sure?"}
YES = {"role": "assistant", "content": "Yes."}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return phi(tmp_path_factory.mktemp("phi"), chat=CHAT)


def imported(store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer, *rows: Any) -> list[Any]:
    import_rows(store, write_rows(tmp_path / "rows.jsonl", *rows), tokenizer=tokenizer)
    return list(store.trajectories())


def spans(tokenizer: Tokenizer, item: Any) -> list[tuple[bool, str]]:
    """Who wrote what, in order, each context on its own."""
    found: list[tuple[bool, list[int]]] = []
    mask = item.completion_mask or (True,) * len(item.token_ids)
    for place, (own, token) in enumerate(zip(mask, item.token_ids, strict=True)):
        if not found or found[-1][0] != own or place in (item.contexts or {}):
            found.append((own, []))
        found[-1][1].append(token)
    return [(own, tokenizer._text(ids)) for own, ids in found]


def test_turns_of_tools_and_users_are_not_the_policys(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = (
        {"prompt": ASKED, "completion": [CALLED, RESULT, YES], "tools": TOOLS, "reward": 1},
        {"messages": [*ASKED, CALLED, RESULT, YES], "tools": json.dumps(TOOLS), "reward": 1},
        {"prompt": ASKED, "completion": [CALLED, RESULT], "tools": TOOLS, "reward": 0},
    )
    first, last = imported(store, tmp_path, tokenizer, *rows)  # two are the same
    [prompt] = store.prompts()
    assert prompt.template == {"tools": TOOLS}
    assert tokenizer._text(prompt.token_ids or ()).startswith('<|user|>tools [{"type"')
    call = '[add {"a": 2}]<|end|>'
    answer = "\n<|user|>tool: 4<|end|>\n"
    assert spans(tokenizer, first) == [
        (True, call),
        (False, answer + "<|assistant|>"),
        (True, "Yes.<|end|>"),
    ]
    assert spans(tokenizer, last) == [(True, call), (False, answer)]
    assert first.info == {"completion": [CALLED, RESULT, YES]}


def test_a_template_that_writes_earlier_turns_anew_begins_a_context(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    row = {"prompt": ASKED, "completion": [SAID, MORE, YES], "reward": 1, "turn_rewards": [0.5, 0]}
    [item] = imported(store, tmp_path, tokenizer, row)
    assert spans(tokenizer, item) == [(True, "(easy)It is 4.<|end|>"), (True, "Yes.<|end|>")]
    [(place, context)] = item.contexts.items()
    assert tokenizer._text(context) == (
        "<|user|>user: 2+2?<|end|>\n<|assistant|>It is 4.<|end|>\n"
        "<|user|>user: sure?<|end|>\n<|assistant|>"
    )
    assert item.token_rewards.nonzero().tolist() == [[place - 1]]
    assert (item.total_reward, item.num_turns) == (1.5, 2)


def test_a_turn_of_weight_0_is_read_and_not_learned(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    row = {"prompt": ASKED, "completion": [{**YES, "weight": 0}, MORE, YES], "reward": 1}
    [item] = imported(store, tmp_path, tokenizer, row)
    assert [own for own, _ in spans(tokenizer, item)] == [False, True]


@pytest.mark.parametrize(
    ("mask", "ids"),
    [
        ({"completion_mask": [1, 0, 0, 1]}, [5, 6, 7, 8]),
        ({"env_mask": [1, 0, 0, 1]}, [5, 6, 7, 8]),
        ({"tool_mask": [True, False, False, True]}, [5, 6, 7, 8]),
        ({"assistant_masks": [0, 0, 1, 0, 0, 1]}, [5, 6, 7, 8]),
        ({"response_mask": [1, 0, 0, 1]}, [5, 6, 7, 8]),
        ({"loss_mask": [0, 0, 1, 0, 0, 1]}, [5, 6, 7, 8]),
    ],
)
def test_masks_of_rows_are_used_under_all_names(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer, mask: Any, ids: list[int]
) -> None:
    row = {"prompt": "a", "prompt_ids": [3, 4], "completion_ids": ids, "reward": 1, **mask}
    [item] = imported(store, tmp_path, tokenizer, row)
    assert item.completion_mask == (True, False, False, True)
    assert store.get_prompts([item.prompt_id])[0].columns is None


TASK = {"type": "T", "data": {"prompt": "2+2?", "answer": "4", "level": 3}, "key": "k", "hash": "h"}
AGENT = {"config": {"model": "m", "id": "react"}, "name": "agent", "runtime": None}


def node(parent: int | None, role: str, ids: list[int], own: int = 0, **more: Any) -> dict:
    """The last `own` of the ids are sampled."""
    mask = [False] * (len(ids) - own) + [True] * own
    message = {"role": role, "content": f"{role} {ids}"} | more
    sampled = {"sampled": own > 0, "logprobs": [-0.5] * own}
    return {"parent": parent, "message": message, "token_ids": ids, "mask": mask, **sampled}


NODES = [
    node(None, "user", [1, 2]),
    node(0, "assistant", [3, 4, 5], 2, tool_calls=[{"id": "c", "name": "f", "arguments": "{}"}]),
    node(1, "tool", [6], tool_call_id="c"),
    node(2, "assistant", [7, 8], 1),
    node(None, "user", [1, 9]),  # the history, rendered anew
    node(4, "assistant", [7, 8, 8], 2),
]
# Every field of a trace of verifiers 0.4.
TRACE: dict[str, Any] = {
    "version": 1,
    "id": "t",
    "verifiers": {"version": "0.4.0"},
    "task": TASK,
    "agent": AGENT,
    "tools": [],
    "nodes": NODES,
    "calls": [{"node": 5, "model": "m", "finish_reason": "stop", "sampling": {"temperature": 0.7}}],
    "mm_token_type_id_map": {},
    "request_rewrites": [],
    "response_rewrites": [],
    "rewards": {"right": {"score": 1.0, "weight": 0.5}, "short": {"score": 0.25}},
    "metrics": {"turns": 2.0},
    "info": {"mine": 1},
    "root_reply": "4",
    "extra_usage": [],
    "is_completed": True,
    "ok": True,
    "stop_condition": "done",
    "is_timeout": False,
    "errors": [],
    "timing": {"start": 1.0},
    "num_input_tokens": 4,
    "num_output_tokens": 5,
    "num_total_tokens": 9,
}


def test_a_trace_of_verifiers_is_a_trajectory_of_its_branches(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    [item] = imported(store, tmp_path, tokenizer, TRACE)
    [prompt] = store.prompts()
    assert (prompt.token_ids, prompt.answer) == ((1, 2, 3), "4")
    assert prompt.content == [{"role": "user", "content": "user [1, 2]"}]
    assert item.token_ids == (4, 5, 6, 7, 8, 8, 8)
    assert item.completion_mask == (True, True, False, False, True, True, True)
    assert item.contexts == {5: (1, 9, 7)}
    assert item.behaviour_logprobs.tolist() == [-0.5, -0.5, 0, 0, -0.5, -0.5, -0.5]
    assert (item.reward, item.finish, item.reason, item.temperature) == (0.75, "eos", "done", 0.7)
    assert item.origin.model == "m"


def test_no_field_of_a_trace_is_lost(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    [item] = imported(store, tmp_path, tokenizer, TRACE)
    [prompt] = store.prompts()
    kept = {name: value for name, value in item.info.items() if name in TRACE}
    assert kept.keys() | {"task"} == TRACE.keys()
    assert kept == {name: TRACE[name] for name in kept} | {"nodes": kept["nodes"]}
    learned = {"token_ids", "mask", "logprobs"}
    assert kept["nodes"] == [{k: v for k, v in n.items() if k not in learned} for n in NODES]
    assert prompt.columns == {"task": TASK}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {}}, "rewards must be scores by name, got {}: it was not judged"),
        ({"rewards": {"a": None}}, "it was not judged"),
        ({"nodes": []}, "nodes must be a list of messages"),
        ({"nodes": [{"parent": 3, "message": {}}]}, r"nodes\[0\] must have an earlier parent"),
        ({"nodes": NODES[:1]}, "nodes must have a sampled message behind a prompt"),
        ({"mm_token_type_id_map": {"5": 1}}, "mm_token_type_id_map must be empty"),
        ({"nodes": [*NODES[:3], {**NODES[3], "mask": []}]}, r"nodes\[3\].mask must have 2 entries"),
        (
            {"nodes": [*NODES[:3], {**NODES[3], "logprobs": [0, 0, 0]}]},
            r"nodes\[3\].logprobs must have 1 entries",
        ),
        (
            {"nodes": [{**n, "token_ids": [], "mask": [], "logprobs": []} for n in NODES]},
            "2 branches without token_ids",
        ),
    ],
)
def test_a_trace_that_cannot_be_learned_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_row(TRACE | changes, "auto", Defaults())


METRICS = {"prompt_token_ids": [1, 2, 3], "completion_token_ids": [4, 5], "logprobs": [-1.0, -2.0]}
LATER = {"prompt_token_ids": [1, 2, 3, 4, 5, 6], "completion_token_ids": [7], "cost_usd": 0.5}
STEPS = [
    {"step_id": 1, "source": "system", "message": "Be brief.", "timestamp": "2026-01-01"},
    {"step_id": 2, "source": "user", "message": "2+2?"},
    {
        "step_id": 3,
        "source": "agent",
        "message": "",
        "model_name": "m",
        "reasoning_effort": "low",
        "reasoning_content": "easy",
        "tool_calls": [{"tool_call_id": "c", "function_name": "add", "arguments": {"a": 2}}],
        "observation": {"results": [{"source_call_id": "c", "content": "4"}]},
        "metrics": METRICS | {"extra": {"reward": 0.25}},
    },
    {"step_id": 4, "source": "agent", "message": "4", "metrics": LATER, "extra": {"mine": 1}},
]
# Every field of ATIF.
ATIF: dict[str, Any] = {
    "schema_version": "ATIF-v1.4",
    "session_id": "s",
    "agent": {"name": "a", "version": "1", "model_name": "m", "tool_definitions": TOOLS},
    "steps": STEPS,
    "notes": "none",
    "final_metrics": {"total_steps": 4, "extra": {"reward": 1.0}},
    "extra": {"mine": 2},
}


def test_atif_with_token_ids_is_taken_as_it_was_generated(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "trajectory.json").write_text(json.dumps(ATIF))
    import_rows(store, tmp_path / "trajectory.json")
    [item] = store.trajectories()
    [prompt] = store.prompts()
    assert [m["role"] for m in prompt.content] == ["system", "user"]  # type: ignore[index]
    assert (prompt.token_ids, prompt.template) == ((1, 2, 3), {"tools": TOOLS})
    assert (item.token_ids, item.completion_mask) == ((4, 5, 6, 7), (True, True, False, True))
    assert item.behaviour_logprobs is None, "the second turn has none"
    assert item.token_rewards.tolist() == [0, 0.25, 0, 0] and item.reward == 1
    kept = {k: v for k, v in ATIF.items() if k != "steps"}
    assert kept.items() <= item.info.items()
    learned = {"prompt_token_ids", "completion_token_ids", "logprobs"}
    for given, found in zip(STEPS, item.info["steps"], strict=True):
        metrics = {k: v for k, v in given.get("metrics", {}).items() if k not in learned}
        assert found == (given | {"metrics": metrics} if metrics else given)


def test_atif_without_token_ids_is_rendered(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    steps = [{k: v for k, v in step.items() if k != "metrics"} for step in STEPS]
    [item] = imported(store, tmp_path, tokenizer, ATIF | {"steps": steps})
    assert spans(tokenizer, item) == [
        (True, '(easy)[add {"a": 2}]<|end|>'),
        (False, "\n<|user|>tool: 4<|end|>\n<|assistant|>"),
        (True, "4<|end|>"),
    ]
    copied = [*steps[:2], {**steps[2], "is_copied_context": True}, steps[3]]
    *_, other = imported(store, tmp_path, tokenizer, ATIF | {"steps": copied})
    assert sum(other.completion_mask) == len("4") + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_metrics": None}, "ATIF has no place for a reward: put it beside the fields"),
        ({"steps": STEPS[:2]}, "steps must have one of the agent behind a prompt"),
        ({"steps": [*STEPS[:3], {**STEPS[3], "metrics": {}}]}, "every step of the agent must have"),
        ({"steps": [{"source": "tool"}, *STEPS]}, "the source of a step must be system, user"),
    ],
)
def test_atif_that_cannot_be_learned_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_row(ATIF | changes, "auto", Defaults())


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_what_is_exported_is_imported_as_it_was(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    rows = [
        {"prompt": ASKED, "completion": [CALLED, RESULT, YES], "tools": TOOLS, "reward": 1},
        {"prompt": ASKED, "completion": [SAID, MORE, YES], "reward": 1, "turn_rewards": [0.5, 0]},
        TRACE,
        ATIF,
    ]
    before = imported(store, tmp_path, tokenizer, *rows)
    export_rows(store, tmp_path / f"out{kind}", tokenizer=tokenizer)
    with TrajectoryStore(tmp_path / "again.db") as again:
        import_rows(again, tmp_path / f"out{kind}")
        assert contents(again) == contents(store)
        after = list(again.trajectories())
    for one, other in zip(before, after, strict=True):
        for name in ("token_ids", "completion_mask", "contexts", "info", "reward", "reason"):
            assert getattr(one, name) == getattr(other, name), name
        assert str(one.token_rewards) == str(other.token_rewards)
        assert str(one.behaviour_logprobs) == str(other.behaviour_logprobs)
    if kind == ".jsonl":
        first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
        assert first["completion"] == [CALLED, RESULT, YES] and first["tools"] == TOOLS
        assert first["completion_mask"] == list(map(int, before[0].completion_mask))


def test_turns_that_do_not_follow_each_other_are_refused() -> None:
    with pytest.raises(RowError, match="the first turn must read the prompt"):
        join([1, 2], [Turn([2], [3])])
    with pytest.raises(RowError, match="logprobs must be one for each of the 2 tokens"):
        join([1], [Turn([1], [3, 4], [0.0])])


def test_logs_of_every_form_are_learned_and_come_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("accelerate")
    from trainer_cases import make_model
    from trainer_process import settings

    from spo_ext.store import PromptValue
    from spo_ext.trainer import SPOConfig, SPOTrainer

    rows = (
        {"prompt": ASKED, "completion": [CALLED, RESULT, YES], "tools": TOOLS, "reward": 1},
        {"prompt": ASKED, "completion": [SAID, MORE, YES], "reward": 0, "turn_rewards": [0.5, 0]},
        {
            "prompt": "a",
            "prompt_ids": [3],
            "completion_ids": [5, 6],
            "env_mask": [0, 1],
            "reward": 1,
        },
        TRACE,
        ATIF,
    )
    with TrajectoryStore(tmp_path / "store.db") as store:
        before = imported(store, tmp_path, tokenizer, *rows)
        store.put_q0({one.id: PromptValue(0.5, 4, 0.5, 1.0) for one in store.prompts()})
    how = {"mixture": "offline", "rollouts": "none", "objective": "squared", "group_size": 1}
    shape = {"vocab_size": 300, "max_position_embeddings": 512}
    config = SPOConfig(
        **settings(tmp_path, **how, per_device_train_batch_size=5, max_steps=20, learning_rate=1e-2)
    )
    trainer = SPOTrainer(make_model(**shape), config, tokenizer._tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.2 * losses[0]
    turns = [line["store/turns"] for line in trainer.state.log_history if "loss" in line]
    assert set(turns) == {(2 + 2 + 1 + 3 + 2) / 5}
    with (
        TrajectoryStore(tmp_path / "store.db") as store,
        TrajectoryStore(tmp_path / "b.db") as again,
    ):
        export_rows(store, tmp_path / "out.jsonl")
        import_rows(again, tmp_path / "out.jsonl")
        assert contents(again) == contents(store)
        assert [one.info for one in again.trajectories()] == [one.info for one in before]
