"""Every field of a row is used, kept as a column of its prompt, or a reason to refuse the row."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, get_args

import data_cases as cases
import pytest
from data_cases import contents, import_rows, write_rows
from rollout_cases import Scripted, decode

from spo_ext.data.commands import _FORMATS
from spo_ext.data.exporter import export_rows
from spo_ext.data.formats import PARSERS, parse_row
from spo_ext.data.records import Defaults
from spo_ext.rollout import Rollouts, Sampling
from spo_ext.rollout.rewards import as_reward
from spo_ext.store import Prompt, TrajectoryStore
from spo_ext.store.records import RESERVED, Split

CHAT = [{"role": "user", "content": "2 + 2?"}]
REPLY = [{"role": "assistant", "content": "4"}]
WRONG = [{"role": "assistant", "content": "5"}]

# Of each form a row with every documented field, and the fields that are used: all others are kept.
FORMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "code_contests": (
        "code_contests",
        {
            **cases.CODE_CONTESTS,
            "cf_contest_id": 1,
            "cf_index": "A",
            "cf_points": 0.5,
            "cf_rating": 800,
            "cf_tags": ["math"],
            "is_description_translated": False,
            "untranslated_description": "",
            "memory_limit_bytes": 256 << 20,
        },
        "description public_tests private_tests generated_tests solutions incorrect_solutions "
        "time_limit memory_limit_bytes input_file output_file",
    ),
    "taco": (
        "taco",
        {
            **cases.TACO,
            "raw_tags": "[]",
            "name": "Sum",
            "source": "aizu",
            "skill_types": "[]",
            "url": "https://example.org/1",
            "Expected Auxiliary Space": "O(1)",
            "Expected Time Complexity": "O(1)",
            "time_limit": "1.0 seconds",
            "memory_limit": "256.0 megabytes",
            "date": "2020-01-01",
            "picture_num": "0",
        },
        "question solutions starter_code input_output",
    ),
    "apps": (
        "apps",
        {**cases.APPS, "difficulty": "interview", "url": "https://example.org/2"},
        "question solutions starter_code input_output",
    ),
    "mbpp": ("mbpp", cases.MBPP, "text code test_list test_setup_code challenge_test_list"),
    "mbpp_sanitized": (
        "mbpp",
        {**cases.MBPP_SANITIZED, "source_file": "a.ipynb"},
        "prompt code test_imports test_list",
    ),
    "mbppplus on the hub": (
        "mbppplus",
        {**cases.MBPP_PLUS, "source_file": "a.ipynb"},
        "prompt code test_imports test_list test",
    ),
    "mbppplus": (
        "mbppplus",
        {
            "task_id": "Mbpp/3",
            "prompt": '"""\nWrite a function to double.\nassert double(2) == 4\n"""\n',
            "entry_point": "double",
            "canonical_solution": "\ndef double(x):\n    return 2 * x\n",
            "base_input": [[1]],
            "plus_input": [[2]],
            "atol": 0,
            "contract": "\n    assert isinstance(x, int)\n",
            "assertion": "assert double(2) == 4",
        },
        "prompt entry_point canonical_solution base_input plus_input atol assertion",
    ),
    "humaneval": ("humaneval", cases.HUMANEVAL, "prompt canonical_solution test entry_point"),
    "humanevalplus": (
        "humanevalplus",
        {
            **cases.HUMANEVAL,
            "base_input": [[1]],
            "plus_input": [["a"]],
            "atol": 0,
            "contract": "",
        },
        "prompt entry_point canonical_solution base_input plus_input atol test",
    ),
    "humanevalplus on the hub": (
        "humanevalplus",
        cases.HUMANEVAL_PLUS,
        "prompt canonical_solution test entry_point",
    ),
    "livecodebench": (
        "livecodebench",
        {
            **cases.LIVECODEBENCH,
            "contest_id": "abc1",
            "contest_date": "2024-01-01T00:00:00",
            "difficulty": "easy",
        },
        "question_content starter_code public_test_cases private_test_cases metadata",
    ),
    "gsm8k": (
        "gsm8k",
        {"question": "6 boxes of 12?", "answer": "6 * 12 = <<6*12=72>>72\n#### 72"},
        "question answer",
    ),
    "math": (
        "math",
        {
            "problem": "Half of 1?",
            "level": "Level 1",
            "type": "Algebra",
            "solution": r"It is $\boxed{\frac{1}{2}}$.",
        },
        "problem solution",
    ),
    "math_500": (
        "math",
        {
            "problem": "Half of 1?",
            "solution": "It is half.",
            "answer": r"\frac{1}{2}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/1.json",
        },
        "problem solution answer",
    ),
    "verl": (
        "verl",
        {
            "data_source": "openai/gsm8k",
            "prompt": CHAT,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"split": "train", "index": 0, "answer": "#### 4", "question": "2 + 2?"},
        },
        "prompt",
    ),
    "trl": (
        "trl",
        {
            "prompt": "2 + 2 =",
            "completion": "4",
            "completion_ids": [4, 5],
            "prompt_ids": [2],
            "reward": 1.0,
            "tests": {"kind": "stdin", "inputs": ["1"], "expected": ["1"]},
            "answer": "4",
            "split": "dev",
            "model": "m",
        },
        "prompt completion completion_ids prompt_ids reward tests answer split model",
    ),
    "trl, kto": (
        "trl",
        {"prompt": CHAT, "completion": REPLY, "completion_ids": [4], "label": True, "id": "4"},
        "prompt completion completion_ids label",
    ),
    "trl, a prompt": ("trl", {"prompt": "a", "label": 3, "model": "m"}, "prompt"),
}  # fmt: skip
# What stays of a field that is used, too.
REST = {"verl": {"reward_model": {"style": "rule"}}}


def test_every_format_can_be_named() -> None:
    assert set(_FORMATS) == {"auto", *PARSERS}
    assert {form[0] for form in FORMS.values()} == set(PARSERS) - {"evalplus", "verifiers", "atif"}


@pytest.mark.parametrize("name", FORMS)
def test_every_documented_field(name: str) -> None:
    format_name, row, used = FORMS[name]
    kept = {key: value for key, value in row.items() if key not in used.split()}
    kept |= REST.get(name, {})
    for how in ("auto", format_name):
        prompt = parse_row(row | {"mine": {"a": [1, None]}}, how, Defaults()).prompt
        assert prompt.columns == kept | {"mine": {"a": [1, None]}}
        bare = parse_row(row, how, Defaults(without=tuple(kept))).prompt
        assert bare.columns is None and bare.content == prompt.content
        assert (bare.tests, bare.split) == (prompt.tests, prompt.split)
    others = set(get_args(Split)) - {prompt.split}
    for split in others if "split" not in row else ():
        assert parse_row(row | {"split": split}, "auto", Defaults()).prompt.split == split


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", FORMS)
def test_a_column_of_every_form_reaches_a_reward_and_an_export(
    tmp_path: Path, name: str, kind: str
) -> None:
    if kind == ".parquet":
        pytest.importorskip("pyarrow")
    _, row, _ = FORMS[name]
    store, again = TrajectoryStore(tmp_path / "a.db"), TrajectoryStore(tmp_path / "b.db")
    path = write_rows(tmp_path / f"rows{kind}", row | {"mine": "to be seen"})
    _, problems = import_rows(store, path)
    assert [problem.kind for problem in problems] in ([], ["note"])
    [prompt] = store.prompts()
    seen: list[str] = []

    def judge(completions: list[str], mine: list[str], **_: Any) -> list[float]:
        seen.extend(mine)
        return [1.0] * len(completions)

    how: dict[str, Any] = {"run": "r", "sampling": Sampling(1), "decode": decode}
    Rollouts(store, Scripted(), as_reward(judge), **how).collect([prompt], 0)
    assert seen == ["to be seen"]
    export_rows(store, tmp_path / f"out{kind}")
    import_rows(again, tmp_path / f"out{kind}")
    assert contents(again) == contents(store) and contents(store)[0][-1]["mine"] == "to be seen"
    export_rows(store, tmp_path / "out.jsonl")
    written = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert written["mine"] == "to be seen"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        name: ({"prompt": "a", name: value}, f"the column {name} cannot be used: {why}")
        for name, value, why in (
            ("images", ["a.png"], "the prompt is stored as text alone"),
            ("image", {"bytes": "x"}, "the prompt is stored as text alone"),
            ("audio", "a.wav", "the prompt is stored as text alone"),
        )
    },
    "masks of other forms": (
        {**cases.MBPP, "completion_mask": [1]},
        "completion_mask is of rows of format trl, and this one is of format mbpp",
    ),
    "a mask without ids": ({"prompt": "a", "env_mask": [1]}, "env_mask is of token ids, and the"),
    "a mask too short": (
        {"prompt": "a", "completion_ids": [1, 2], "tool_mask": [1], "reward": 1},
        "tool_mask must have one entry for each of 2 tokens, got 1",
    ),
    "a mask of others": (
        {"prompt": "a", "completion_ids": [1], "tool_mask": ["x"], "reward": 1},
        "tool_mask must be a list of 0 and 1",
    ),
    "two masks": (
        {"prompt": "a", "completion_ids": [1], "tool_mask": [1], "env_mask": [1], "reward": 1},
        "a row must have one mask of its tokens, got env_mask, tool_mask",
    ),
    "tools of a text": ({"prompt": "a", "tools": [{"name": "f"}]}, "tools is for a chat template"),
    "tools that are none": ({"prompt": CHAT, "tools": {"name": "f"}}, "tools must be a list"),
    "arguments of ours": (
        {"prompt": CHAT, "chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs must be without tokenize, which are ours",
    ),
    "rewards of turns": (
        {"prompt": "a", "completion": "b", "turn_rewards": [1], "reward": 1},
        "turn_rewards must come with a completion of messages",
    ),
    "parts": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "prompt must be text, got a part of type 'image'",
    ),
    "a turn of a tool": (
        {"prompt": CHAT, "completion": [*REPLY, {"role": "tool", "content": "5"}, *REPLY],
         "completion_ids": [1], "reward": 1},
        "completion_ids of several turns must come with a completion_mask",
    ),
    "no turn": ({"prompt": CHAT, "completion": [], "reward": 1}, "begin with the assistant's, got"),
    "a user's turn": ({"prompt": CHAT, "completion": CHAT, "reward": 1}, "got user"),
    "supervised": ({"prompt": "a", "completion": "b"}, "needs a reward, or a label"),
    "a reward of nothing": ({"prompt": "a", "reward": 1}, "the column reward means something else"),
    "steps": ({"prompt": "a", "completions": ["b"], "labels": [True]}, "--without-columns complet"),
    "a name of TRL": ({"prompt": "a", "trainer_state": 1}, "the column trainer_state means"),
    "no JSON": ({"prompt": "a", "x": float("inf")}, "the column x must be JSON to be kept"),
    "a bad name": ({"prompt": "a", "x" * 201: 1}, "the name of a column must be text of 1 to 200"),
    "a blank answer": ({"prompt": "a", "answer": " "}, "answer must not be blank"),
    "chosen alone": ({"prompt": "a", "chosen": "b"}, "chosen and rejected must have a prompt"),
    "pairs of text": ({"chosen": "a b", "rejected": "a c"}, "or be conversations that begin alike"),
    "of LeetCode": (
        {"prompt": "p", "starter_code": "class Solution:", "difficulty": "Easy"},
        "the columns starter_code are of a problem for programs, and there are no tests",
    ),
    "LeetCode's prompt": (
        {**cases.HUMANEVAL, "problem_description": "Two sum"}, "prompt must be the problem"
    ),
    "gsm8k without marks": ({"question": "q", "answer": "72"}, "must end in #### and the final"),
    "gsm8k without answer": ({"question": "q", "answer": "72 ####"}, "must end in #### and"),
    "math without a box": ({"problem": "p", "solution": "so 2"}, "there is no answer, neither"),
    "math with half a box": ({"problem": "p", "solution": r"\boxed{2"}, "there is no answer"),
    "verl without truth": ({"prompt": "a", "reward_model": {"style": "rule"}}, "a ground_truth"),
    "verl without model": ({"prompt": "a", "reward_model": 3}, "reward_model must be an object"),
    "verl's tools": (
        {**FORMS["verl"][1], "extra_info": {"need_tools_kwargs": True}}, "extra_info asks for tools"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_by_name(name: str) -> None:
    row, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        parse_row(row, "auto", Defaults())


def test_nothing_is_no_reason() -> None:
    row = {"prompt": "a", "images": [], "tools": None, "x": None, "y": float("nan")}
    assert parse_row(row, "auto", Defaults()).prompt == Prompt("a")
    row = {"prompt": "a", "starter_code": "x = ", "images": ["b.png"]}
    kept = parse_row(row, "trl", Defaults(without=("images",))).prompt.columns
    assert kept == {"starter_code": "x = "}


def test_text_in_parts_is_text() -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2"}]
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": parts}]
    prompt = parse_row({"prompt": messages}, "auto", Defaults()).prompt
    assert prompt.content == [messages[0], {"role": "user", "content": "2 + 2"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT, "chosen": REPLY, "rejected": WRONG},
        {"chosen": CHAT + REPLY, "rejected": CHAT + WRONG},
        {"prompt": "2 + 2?", "chosen": CHAT + REPLY, "rejected": CHAT + WRONG},
    ],
)
def test_preferences_are_right_and_wrong(row: dict[str, Any]) -> None:
    record = parse_row(row, "auto", Defaults())
    assert record.prompt == Prompt(CHAT)
    assert [(c.content, c.reward) for c in record.completions] == [(REPLY, 1.0), (WRONG, 0.0)]
    assert record.notes == ("chosen gets reward 1, rejected 0",)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so $\boxed 5$ it is", "5"),
        (r"\fbox{x = 3}", "x = 3"),
        (r"\boxed {7}", "7"),
    ],
)
def test_the_answer_of_math(solution: str, answer: str) -> None:
    row = {"problem": "p", "solution": solution}
    assert parse_row(row, "auto", Defaults()).prompt.answer == answer


def test_ground_truths_of_verl() -> None:
    row = FORMS["verl"][1]
    by_model = row | {"reward_model": {"style": "model", "ground_truth": "4"}}
    record = parse_row(by_model, "auto", Defaults())
    assert record.prompt.answer is None and "style 'model'" in record.notes[0]
    assert record.prompt.columns is not None
    assert record.prompt.columns["reward_model"] == by_model["reward_model"]
    several = row | {"reward_model": {"style": "rule", "ground_truth": {"target": ["4"]}}}
    record = parse_row(several, "auto", Defaults())
    assert record.prompt.answer is None and "neither text nor a number" in record.notes[0]
    truth = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
    of_code = row | {"reward_model": {"style": "rule", "ground_truth": truth}}
    prompt = parse_row(of_code, "auto", Defaults()).prompt
    assert prompt.answer is None and prompt.tests["expected"] == ["3"]


def test_values_of_parquet_are_json(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    row = {"prompt": "a", "when": datetime.datetime(2024, 1, 2), "day": datetime.date(2024, 1, 2)}
    store = TrajectoryStore(tmp_path / "a.db")
    import_rows(store, write_rows(tmp_path / "rows.parquet", row))
    [prompt] = store.prompts()
    assert prompt.columns == {"when": "2024-01-02T00:00:00", "day": "2024-01-02"}


COLUMNS: list[dict[str, Any]] = [
    {"text": "a", "int": 1, "float": 0.5, "flag": True, "list": ["a"], "numbers": []},
    {"text": "", "int": -(2**63), "list": [], "numbers": [1, 2], "mixed": 1, "deep": {"a": [None]}},
    {"mixed": "1", "nested": [[1]], "big": 2**70, "odd": "\ud800", "empty": [], "either": 1},
    {"either": 1.5, "with null": ["a", None], "list or text": ["a"]},
    {"list or text": "a", "chosen": "b", "rejected": "c"},
    {"messages": [{}], "tools": [["d"]], "model": "m", "label": "e"},
]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_columns_of_every_type_come_back(tmp_path: Path, kind: str) -> None:
    store, again = TrajectoryStore(tmp_path / "a.db"), TrajectoryStore(tmp_path / "b.db")
    store.add_prompts([Prompt(str(i), columns=each) for i, each in enumerate(COLUMNS)])
    if kind == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        export_rows(store, tmp_path / "rows.parquet")
        types = {
            field.name: str(field.type) for field in parquet.read_schema(tmp_path / "rows.parquet")
        }
        plain = {"text": "string", "int": "int64", "float": "double", "flag": "bool"}
        lists = {name: types[name].partition("<")[0] for name in ("list", "numbers")}
        assert types | plain == types and lists == {"list": "list", "numbers": "list"}
        others = {name for each in COLUMNS for name in each} - plain.keys() - lists.keys()
        assert {types[name] for name in others} == {"string"}
    export_rows(store, tmp_path / f"rows{kind}")
    _, problems = import_rows(again, tmp_path / f"rows{kind}")
    assert problems == [] and contents(again) == contents(store)
    assert [prompt.columns for prompt in again.prompts()] == COLUMNS


def test_the_same_prompt_with_other_columns_is_pointed_out(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path / "a.db")
    row = {"prompt": "a", "answer": "1", "level": 3, "completion_ids": [1], "reward": 1.0}
    rows = [
        {**row, "id": 1},
        {**row, "id": 2, "completion_ids": [2]},
        {**row, "id": 1, "completion_ids": [3]},
        {**row, "id": 2, "answer": "2"},
    ]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    _, [problem] = import_rows(store, path)
    assert (problem.kind, problem.row) == ("note", 2) and store.counters()["prompts"] == 3
    assert "other columns (id)" in problem.reason and "--without-columns id" in problem.reason
    assert import_rows(store, path)[1] == []
    later = write_rows(tmp_path / "b.jsonl", {**row, "id": 3, "level": 4})
    _, [problem] = import_rows(store, later)
    assert "other columns (id, level)" in problem.reason
    summary, problems = import_rows(TrajectoryStore(tmp_path / "b.db"), path,
                                    without_columns=("id", "none"))  # fmt: skip
    assert problems == [] and summary.loaded.prompts == 2
    assert "columns left out: id (4 rows), none (0 rows)" in str(summary)


def test_columns_identify_a_prompt(tmp_path: Path) -> None:
    with TrajectoryStore(tmp_path / "a.db") as store:
        first, second, again = (
            store.add_prompt(Prompt("a", columns=columns)) for columns in (None, {"b": 1}, {})
        )
        assert first == again != second
        assert store.add_prompt(Prompt("a", columns={"b": 1})) == second


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ([1], "columns must be an object of fields by name, or None, got"),
        ({1: 2}, "the name of a column must be text of 1 to 200 characters"),
        ({"a": {1}}, "columns must be JSON, got"),
        ({"a": None}, r"columns\['a'\] must be given, or left out, got None"),
        *(
            ({name: 1}, f"columns must be without names that have .* got '{name}'")
            for name in sorted(RESERVED)
        ),
    ],
)
def test_columns_that_cannot_be(columns: Any, match: str) -> None:
    with pytest.raises(ValueError, match=f"Prompt: .*{match}"):
        Prompt("a", columns=columns)


STDIN = {"kind": "stdin", "inputs": ["1"], "expected": ["1"]}
CHECK = {"kind": "check", "entry_point": "f", "check": "assert f(1) == 2", "prefix": ""}


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (STDIN | {"inputs": [], "expected": []}, "at least one"),
        (STDIN | {"inputs": "1", "expected": "1"}, "inputs of tests must be a list, got '1'"),
        (STDIN | {"packages": ["no_such_package"]}, "no_such_package, which is not installed"),
        (STDIN | {"packages": "numpy"}, "packages of tests must be a list, got 'numpy'"),
        (STDIN | {"limits": {"cpu_seconds": -1}}, "cpu_seconds must be positive, got -1"),
        (CHECK | {"check": "f("}, "the tests are no Python that can be read"),
        (CHECK | {"check": "x = 1"}, "the tests must call f"),
        (CHECK | {"function": True}, "the tests must define check"),
        (CHECK | {"check": "import no_such\nassert f(1)"}, "no_such, which is not installed"),
    ],
)
def test_tests_that_no_completion_could_be_judged_by(tests: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_row({"prompt": "a", "tests": tests}, "auto", Defaults())
    assert parse_row({"prompt": "a", "tests": CHECK}, "auto", Defaults()).prompt.tests == CHECK
