"""Every schema into the store, and its tests in the form that the sandbox judges."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import data_cases as cases
import pytest
from data_cases import import_rows, write_rows

from spo_ext.data.tests import packages_of_tests, submission
from spo_ext.data.tokens import Tokenizer
from spo_ext.sandbox import Sandbox, judge
from spo_ext.store import Origin, TrajectoryStore

# Row, its completions right and wrong.
SCHEMAS = {
    "code_contests": (cases.CODE_CONTESTS, [cases.ADD], [cases.SUBTRACT]),
    "taco": (cases.TACO, [cases.ADD], [cases.SUBTRACT]),
    "apps": (cases.APPS, ["turn = lambda x: x[::-1]"], ["turn = lambda x: x"]),
    "mbpp": (cases.MBPP, [cases.MBPP["code"]], ["def similar(a, b): return [4, 5]"]),
    "mbpp_sanitized": (cases.MBPP_SANITIZED, [cases.MBPP_SANITIZED["code"]], ["area = int"]),
    "mbpp_plus": (cases.MBPP_PLUS, [cases.MBPP_PLUS["code"]], ["def area(r): return 3"]),
    "humaneval": (cases.HUMANEVAL, ["    return x + x"], ["    return 4"]),
    "humaneval_plus": (
        cases.HUMANEVAL_PLUS,
        [cases.HUMANEVAL_PLUS["canonical_solution"]],
        ["    return x"],
    ),
    "livecodebench": (
        cases.LIVECODEBENCH,
        [f"{cases.LIVECODEBENCH['starter_code']}return items + [value]",
         "append = lambda a, b: a + [b]"],
        ["def append(items, value): return items"],
    ),
    "livecodebench_stdin": (cases.LIVECODEBENCH_STDIN, [cases.ADD], [cases.SUBTRACT]),
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore(tmp_path / "store.db")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    pytest.importorskip("transformers")
    return Tokenizer(cases.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_from_every_kind_of_file(
    store: TrajectoryStore, tmp_path: Path, name: str, suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    row, right, _wrong = SCHEMAS[name]
    summary, problems = import_rows(store, write_rows(tmp_path / f"rows{suffix}", row))
    [prompt] = store.prompts()
    assert submission(prompt.tests, right[0]).program.source.endswith(right[0])
    assert problems == []
    assert (summary.rows, summary.loaded.prompts, prompt.split) == (1, 1, "train")


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_sandbox_tells_right_from_wrong(
    store: TrajectoryStore, sandbox: Sandbox, tmp_path: Path, name: str
) -> None:
    row, right, wrong = SCHEMAS[name]
    import_rows(store, write_rows(tmp_path / "rows.jsonl", row))
    [prompt] = store.prompts()
    packages = packages_of_tests(prompt.tests)
    programs = [submission(prompt.tests, source) for source in right + wrong]
    with Sandbox(1, packages=packages) if packages else nullcontext(sandbox) as judge_of:
        verdicts = [verdict.ok for verdict in judge(judge_of, programs)]
    assert verdicts == [True] * len(right) + [False] * len(wrong)


def test_solutions_in_python_3_are_trajectories_with_rewards(
    store: TrajectoryStore, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", cases.CODE_CONTESTS)
    summary, _ = import_rows(store, path, tokenizer=tokenizer, split="test")
    assert (summary.foreign, summary.untokenised) == (2, 0)
    [prompt] = store.prompts("test")
    assert prompt.token_ids == tuple(tokenizer.prompt_ids(cases.CODE_CONTESTS["description"]))
    good, bad = store.trajectories()
    assert tokenizer.completion("", tuple(good.token_ids)) == cases.ADD
    assert tokenizer.completion("", tuple(bad.token_ids)) == cases.SUBTRACT
    assert [(t.reward, t.reason) for t in (good, bad)] == [
        (1.0, "solution"),
        (0.0, "incorrect solution"),
    ]
    assert good.origin == bad.origin == Origin("human", run="code_contests")
    assert good.token_ids[-1] == bad.token_ids[-1] == 256  # the end token
    assert (good.finish, good.temperature) == ("eos", None)


def test_solutions_without_a_tokenizer_are_counted(store: TrajectoryStore, tmp_path: Path) -> None:
    summary, problems = import_rows(store, write_rows(tmp_path / "a.jsonl", cases.TACO))
    assert (summary.untokenised, problems, list(store.trajectories())) == (1, [], [])
    assert "1 solutions left out" in str(summary)


MESSAGES = [{"role": "user", "content": "2 + 2?"}]
TRL_ROWS: list[tuple[dict[str, Any], Any, str]] = [
    ({"prompt": "2 + 2 =", "completion": " 4", "reward": 0.5}, "2 + 2 =", " 4<|end|>"),
    ({"prompt": "Sky?", "completion": "red", "label": False}, "Sky?", "red<|end|>"),
    (
        {
            "prompt": MESSAGES,
            "completion": [{"role": "assistant", "content": "4"}],
            "reward": 1,
        },
        "<|user|>2 + 2?<|end|>\n<|assistant|>",
        "4<|end|>",
    ),
    (
        {"messages": [*MESSAGES, {"role": "assistant", "content": "5"}], "reward": -1.0},
        "<|user|>2 + 2?<|end|>\n<|assistant|>",
        "5<|end|>",
    ),
]


@pytest.mark.parametrize("row, prompt_text, completion_text", TRL_ROWS)
def test_texts_and_messages_of_trl_become_ids(
    store: TrajectoryStore,
    tmp_path: Path,
    tokenizer: Tokenizer,
    row: dict[str, Any],
    prompt_text: str,
    completion_text: str,
) -> None:
    _, problems = import_rows(store, write_rows(tmp_path / "a.jsonl", row), tokenizer=tokenizer)
    assert problems == []
    [prompt], [item] = store.prompts(), store.trajectories()
    assert prompt.content == (row["prompt"] if "prompt" in row else MESSAGES)
    assert list(prompt.token_ids or ()) == tokenizer.prompt_ids(prompt_text)
    assert list(item.token_ids) == tokenizer.prompt_ids(completion_text)
    assert item.reward == float(row.get("reward", 0.0))
    assert item.origin == Origin("model", model="unknown")


def test_ids_of_a_row_are_taken_as_they_are(store: TrajectoryStore, tmp_path: Path) -> None:
    row = {"prompt": "a", "prompt_ids": [7], "completion_ids": [8, 9], "reward": 2.0, "model": "m"}
    rows = [row, {"prompt": "b", "answer": "72", "split": "dev"}]
    import_rows(store, write_rows(tmp_path / "a.jsonl", *rows))
    first, second = store.prompts()
    [item] = store.trajectories()
    assert (first.token_ids, item.token_ids, item.origin.model) == ((7,), (8, 9), "m")
    assert (second.answer, second.split) == ("72", "dev")


def test_an_origin_that_is_given_is_that_of_all_rows(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    row = {"prompt": "a", "completion_ids": [8], "reward": 2.0, "model": "m"}
    origin = Origin("policy", run="r", policy_version=4)
    import_rows(store, write_rows(tmp_path / "a.jsonl", row), origin=origin)
    assert [item.origin for item in store.trajectories()] == [origin]


@pytest.mark.parametrize(
    "outputs, wrapped", [([[1], [2]], True), ([1, 2], False), ([[1], [2, 3]], False)]
)
def test_results_that_may_be_wrapped_in_lists_of_one(
    store: TrajectoryStore, tmp_path: Path, outputs: list[Any], wrapped: bool
) -> None:
    tests = {"fn_name": "f", "inputs": [[0], [1]], "outputs": outputs}
    row = {**cases.APPS, "input_output": json.dumps(tests)}
    import_rows(store, write_rows(tmp_path / "a.jsonl", row))
    [prompt] = store.prompts()
    assert prompt.tests.get("wrapped", False) == wrapped


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_large_file_does_not_fill_the_memory(
    store: TrajectoryStore, tmp_path: Path, suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"rows{suffix}"
    write_rows(path, *({"prompt": f"{i:x}" * 10_000} for i in range(1000, 2500)))  # 45 MB of text
    tracemalloc.start()
    try:
        summary, _ = import_rows(store, path)
        peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert summary.loaded.prompts == 1500
    assert peak_mib < 30  # a batch of 256 rows as they are, encoded, and as the database gets them
