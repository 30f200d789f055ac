"""What must not get in: bad rows, prompts of another split, and repeats."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import data_cases as cases
import pytest
from data_cases import contents, import_rows, write_rows
from store_cases import start_process

from spo_ext.data.tests import submission
from spo_ext.store import Prompt, TrajectoryStore

ROW = {"prompt": "p", "completion_ids": [1], "reward": 0.0}
TESTS = {"inputs": ["1"], "outputs": ["1", "2"]}
BAD: dict[str, tuple[Any, str]] = {
    "half a line": ('{"prompt": ', "no JSON: "),
    "no utf-8": ("\udcff", "no JSON: "),
    "a deep nest": ("[" * 100_000, "no JSON: "),
    "a list": ("[1]", "a row must be an object, got [1]"),
    "no known columns": ({"a": 1}, "no known format has just the columns a"),
    "no prompt": ({**ROW, "prompt": 3}, "prompt must be text or messages, got 3"),
    "messages without roles": ({**ROW, "prompt": [{"content": "x"}]}, "a list of messages with"),
    "a long list of nothing": ({**ROW, "prompt": [0] * 10_000}, "a role, got [0, 0"),
    "no reward": ({**ROW, "reward": None}, "needs a reward, or a label"),
    "reward of text": ({**ROW, "reward": "1"}, "it is -inf) must be a finite number"),
    "reward of nan": ({**ROW, "reward": float("nan")}, "must be a finite number"),
    "endless reward": ({**ROW, "reward": 10**400}, "int too large"),
    "no tokenizer": ({"prompt": "p", "completion": "c", "reward": 1}, "no tokenizer is given"),
    "text after messages": (
        {**ROW, "prompt": [{"role": "user"}], "completion": "c"},
        "must both be text or both be messages",
    ),
    "no ids": ({**ROW, "completion_ids": []}, "token_ids must be at least one token"),
    "float ids": ({**ROW, "completion_ids": [1.5]}, "must be token ids in"),
    "unknown split": ({**ROW, "split": "valid"}, "split must be one of train, dev, test"),
    "extra without kind": ({**ROW, "spo": '{"origin": {"run": "r"}}'}, "origin must have"),
    "tests of half JSON": ({**ROW, "tests": "{"}, "tests must be JSON"),
    "file input": ({**cases.CODE_CONTESTS, "input_file": "in.txt"}, "reads or writes a file"),
    "no tests": ({**cases.TACO, "input_output": ""}, "there are no tests"),
    "more outputs": ({**cases.TACO, "input_output": json.dumps(TESTS)}, "1 inputs and 2 outputs"),
    "number as input": (
        {**cases.TACO, "input_output": '{"inputs": [1], "outputs": [1]}'},
        "must be text, got 1",
    ),
    "function without name": (
        {**cases.APPS, "input_output": '{"fn_name": "a b", "inputs": [[1]], "outputs": [1]}'},
        "the function to call must be a name",
    ),
    "languages": (
        {**cases.CODE_CONTESTS, "solutions": {"solution": ["x"], "language": []}},
        "solutions has 1 sources and 0 languages",
    ),
    "no call in the asserts": ({**cases.MBPP, "test_list": ["assert True"],
                                "challenge_test_list": []}, "must call one function"),
    "a class of the program": ({**cases.MBPP, "test_list": ["assert similar(Node(1)) == 1"]},
                               "use nothing else of it, got similar, Node"),
    "tests of no known form": ({"prompt": "b", "tests": ["assert f(1) == 2"]}, "must be an object"),
    "no UTF-8": ({"prompt": "c", "tests": {"kind": "stdin", "inputs": ["\ud800"],
                                           "expected": ["6"]}}, "must be text of UTF-8"),
    "no text": ({"prompt": "d", "tests": {"kind": "stdin", "inputs": [5], "expected": ["6"]}},
                "must be text, got 5"),
    "a package that is not here": ({**cases.HUMANEVAL, "test": "import no_such_thing"},
                                   "import no_such_thing, which is not installed"),
    "no python": ({**cases.MBPP, "test_list": ["assert f("]}, "no Python that can be read"),
    "mixed kinds": (
        {**cases.LIVECODEBENCH, "private_test_cases": '[{"testtype": "stdin"}]'},
        "testtype must be stdin or functional in all tests",
    ),
    "no base64": ({**cases.LIVECODEBENCH, "private_test_cases": "?"}, "cannot be read"),
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore(tmp_path / "store.db")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_reported_and_the_rest_imports(
    store: TrajectoryStore, tmp_path: Path, name: str
) -> None:
    row, reason = BAD[name]
    line = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"prompt": "first"}\n' + line.encode(errors="surrogateescape") + b'\n{"prompt": "last"}\n'
    )
    summary, [problem] = import_rows(store, path)
    assert (problem.kind, problem.file, problem.row) == ("bad", path, 2)
    assert reason in problem.reason and len(problem.reason) <= 300
    assert [prompt.content for prompt in store.prompts()] == ["first", "last"]
    assert (summary.rows, summary.refused) == (3, 1)


def test_a_file_that_breaks_off_is_reported_where_it_does(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    letters = random.Random(0)
    rows = [{"prompt": letters.randbytes(500).hex()} for _ in range(100)]
    path = write_rows(tmp_path / "rows.jsonl.gz", *rows)
    path.write_bytes(path.read_bytes()[:20_000])
    summary, [problem] = import_rows(store, path)
    assert "cannot be read from here on" in problem.reason
    assert 1 < problem.row == summary.rows < 100
    assert store.counters()["prompts"] == summary.rows - 1
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing more")
    _, [problem] = import_rows(store, tmp_path / "rows.parquet")
    assert (problem.row, problem.kind) == (1, "bad")


def test_many_batches_and_a_repeat_that_changes_nothing(store_target: str, tmp_path: Path) -> None:
    store = TrajectoryStore(store_target)
    rows = [{**ROW, "prompt": f"p{i // 2}", "completion_ids": [i + 1]} for i in range(700)]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    summary, _ = import_rows(store, path)
    assert (summary.loaded.prompts, summary.loaded.trajectories) == (350, 700)
    before, counters = contents(store), store.counters()
    again, _ = import_rows(store, path)
    assert (again.loaded.prompts, again.loaded.trajectories) == (0, 0)
    assert (again.loaded.known_trajectories, again.loaded.conflicts) == (700, 0)
    assert contents(store) == before and store.counters() == counters
    rows[0]["reward"] = 1.0
    changed, _ = import_rows(store, write_rows(path, *rows))
    assert changed.loaded.conflicts == 1 and "1 keep another reward" in str(changed)
    assert contents(store) == before


def test_a_killed_import_is_simply_repeated(store: TrajectoryStore, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *({**ROW, "prompt": f"p{i}"} for i in range(5000)))
    body = "from spo_ext.cli import main\nmain(argv)"
    process = start_process(body, "import", str(path), "--store", str(tmp_path / "store.db"))
    deadline = time.monotonic() + 60
    while not store.counters()["prompts"] and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    stored = store.counters()
    assert 0 < stored["prompts"] == stored["trajectories"] < 5000  # whole batches
    assert stored["prompts"] % 256 == 0
    summary, _ = import_rows(store, path)
    assert summary.loaded.prompts == 5000 - stored["prompts"]
    assert store.counters()["trajectories"] == 5000


WORDS = [f"word{i}" for i in range(100)]


def test_a_prompt_of_another_split_is_refused(store: TrajectoryStore, tmp_path: Path) -> None:
    store.add_prompt(Prompt("Add  two\nNumbers!", answer="3", split="test"))
    rows = [
        {"prompt": "add two numbers!"},
        {"prompt": [{"role": "user", "content": "ADD TWO NUMBERS!"}]},
        {"prompt": "add two numbers"},
        {"prompt": "Add  two\nNumbers!", "split": "test"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    summary, problems = import_rows(store, path)
    assert [(item.kind, item.row) for item in problems] == [
        ("contaminated", 1),
        ("contaminated", 2),
    ]
    assert problems[0].reason == "the prompt is in the split test already"
    assert (summary.refused, summary.loaded.prompts) == (2, 2)


def test_two_splits_of_one_file_may_not_share_a_prompt(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    long = " ".join(WORDS)
    rows = [
        {"prompt": long, "split": "train"},
        {"prompt": long.upper(), "split": "dev"},
        {"prompt": long + " more", "split": "test"},
    ]
    _, problems = import_rows(store, write_rows(tmp_path / "rows.jsonl", *rows))
    assert [(item.kind, item.row) for item in problems] == [("contaminated", 2), ("note", 3)]


def test_a_large_overlap_is_reported_and_stored(store: TrajectoryStore, tmp_path: Path) -> None:
    store.add_prompt(Prompt(" ".join(WORDS), split="test"))
    # Runs of 13 words: of 88 in each row, those that lie within the first half are the test's.
    half = [*WORDS[:60], *(f"other{i}" for i in range(40))]
    rows = [
        {"prompt": ", ".join(half)},
        {"prompt": " ".join(half[30:])},
        {"prompt": "word1 word2"},
        {"prompt": " ".join(half), "split": "test"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    summary, problems = import_rows(store, path)
    assert [(item.kind, item.row) for item in problems] == [("note", 1), ("note", 4)]
    reason = "55% of its runs of 13 words are in prompts of the split test"
    assert problems[0].reason == reason
    assert (summary.refused, summary.loaded.prompts) == (0, 4)
    _, problems = import_rows(store, path, split="train", overlap=1.0)
    kinds = [(item.kind, item.row) for item in problems]
    assert kinds == [("note", 1), ("note", 2), ("contaminated", 4)]  # by now test has row 4


def test_tests_of_an_unknown_form_are_no_submission() -> None:
    for tests in (None, {}, {"kind": "calls"}, {"kind": "shell", "expected": [1]}, [1]):
        with pytest.raises(ValueError, match="submission: tests have an unknown form|kind must be"):
            submission(tests, "x = 1")
