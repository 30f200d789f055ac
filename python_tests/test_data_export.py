"""What is exported and imported again is the same, and the two commands do both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import data_cases as cases
import pytest
from data_cases import contents, import_rows, write_rows

from spo_ext.cli import main
from spo_ext.data.exporter import export_rows
from spo_ext.data.tokens import Tokenizer
from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore

KINDS = [".jsonl", ".jsonl.gz", ".parquet"]
CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "\u00e9 \U0001f600 \0"}]


def fill(store: TrajectoryStore, contents: list[Any]) -> None:
    """Trajectories of every kind under the first prompt, none under the others."""
    values = [None, {"kind": "stdin", "inputs": ["1"], "expected": ["2"]}, "72", ["list", 1.5]]
    splits: list[Any] = ["train", "dev", "test", "dev"]
    ids = store.add_prompts(
        [
            Prompt(content, None if i % 2 else [i, 2**32 - 1], values[i % 4], values[-i % 4], split)
            for i, (content, split) in enumerate(zip(contents, splits, strict=False))
        ]
    )
    origins = [
        Origin("policy", run="r", policy_version=2**40, model="m"),
        Origin("model", run="r", model="m"),
        Origin("human"),
    ]
    how: list[dict[str, Any]] = [
        {"behaviour_logprobs": [-0.1, -2.5], "temperature": 0.7, "top_p": 0.9},
        {"reason": "because\n\0", "finish": "truncated"},
        {"temperature": 0.0},
    ]
    rewards = [-math.inf, 0.1, 1.0]
    store.append(
        [
            Trajectory(ids[0], [7, i], reward, origin, **{"finish": "eos", **more})
            for i, (reward, origin, more) in enumerate(zip(rewards, origins, how, strict=True))
        ]
    )
    # What was drawn twice is two trajectories.
    again = Trajectory(ids[0], [7, 2], 1.0, Origin("human"), "eos", temperature=0.0, draw=3)
    store.append([again])


@pytest.mark.parametrize("prompts", [["a", "", "\u00e9\0", "b"], [CHAT, CHAT[:1]]])
@pytest.mark.parametrize("kind", KINDS)
def test_import_of_an_export_is_the_same(tmp_path: Path, kind: str, prompts: list[Any]) -> None:
    if kind == ".parquet":
        pytest.importorskip("pyarrow")
    first, second = TrajectoryStore(tmp_path / "a.db"), TrajectoryStore(tmp_path / "b.db")
    fill(first, prompts)
    assert export_rows(first, tmp_path / f"rows{kind}") == 4 + len(prompts) - 1
    _, problems = import_rows(second, tmp_path / f"rows{kind}")
    assert problems == []
    assert contents(second) == contents(first)
    assert len(contents(second)) == 4 + len(prompts)
    assert not list(tmp_path.glob(".*"))  # no half file beside it


def test_messages_with_tool_calls_and_texts_go_to_jsonl_alone(tmp_path: Path) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    first, second = TrajectoryStore(tmp_path / "a.db"), TrajectoryStore(tmp_path / "b.db")
    fill(first, ["text", [*CHAT, calls]])
    with pytest.raises(ValueError, match="prompt 2 has something else: export to JSONL"):
        export_rows(first, tmp_path / "rows.parquet")
    export_rows(first, tmp_path / "rows.jsonl")
    import_rows(second, tmp_path / "rows.jsonl")
    assert contents(second) == contents(first)


def test_parquet_cannot_mix_texts_and_messages(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path / "a.db")
    fill(store, ["text", CHAT])
    with pytest.raises(ValueError, match="text and prompts that are messages: export to JSONL"):
        export_rows(store, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"must end in .jsonl"):
        export_rows(store, tmp_path / "rows.csv")
    assert not list(tmp_path.glob("rows*"))


def test_an_export_has_texts_and_messages_for_trl(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = Tokenizer(cases.save_tokenizer(tmp_path / "tokenizer"))
    store = TrajectoryStore(tmp_path / "a.db")
    rows = [
        {"prompt": "Sky?", "completion": "blue", "reward": 1.0},
        {
            "prompt": CHAT[1:],
            "completion": [{"role": "assistant", "content": "!"}],
            "reward": 0.0,
        },
    ]
    import_rows(store, write_rows(tmp_path / "in.jsonl", *rows), tokenizer=tokenizer)
    export_rows(store, tmp_path / "out.jsonl", tokenizer=tokenizer)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in written] == rows


def test_exports_of_a_run_and_of_a_split(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path / "a.db")
    fill(store, ["a", "b", "c"])
    assert export_rows(store, tmp_path / "run.jsonl", run="r") == 2
    assert export_rows(store, tmp_path / "dev.jsonl", split="dev") == 1
    assert json.loads((tmp_path / "dev.jsonl").read_text())["prompt"] == "b"
    assert export_rows(store, tmp_path / "good.jsonl", min_reward=0.1) == 3
    rewards = [json.loads(row)["reward"] for row in (tmp_path / "good.jsonl").open()]
    assert sorted(rewards) == [0.1, 1.0, 1.0], "and no prompt without a trajectory"
    assert export_rows(store, tmp_path / "both.jsonl", run="r", min_reward=0.1) == 1


SEVERAL = {**cases.TACO, "question": "Print any divisor of n."}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_notes_of_one_kind_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As those of rows that share a system prompt with another split."""
    system = {"role": "system", "content": " ".join(f"word{i}" for i in range(60))}
    rows = [
        {
            "prompt": [system, {"role": "user", "content": f"question {i} {'and ' * i}"}],
            "split": "test" if i == 0 else "train",
        }
        for i in range(30)
    ]
    path, store = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "store.db"
    status, out, err = run(capsys, "import", path, "--store", store)
    assert status == 0 and "0 contaminated, 29 notes" in out
    first, rest = err.splitlines()
    assert first.startswith(f"{path}:2: note: ") and "are in prompts of the split test" in first
    assert rest.startswith(f"{path}: note: 28 more rows like row 2: ")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "completion_ids": [8], "reward": 2.0}, "{", SEVERAL]
    path, store = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "store.db"  # type: ignore
    given = ("import", path, "--store", store, "--origin", "model:m", "--split", "dev")
    status, out, err = run(capsys, *given)
    assert status == 1
    assert f"{path}:2: bad: no JSON: " in err
    assert f"{path}:3: note: it may have several right answers (Print any)" in err
    assert out.startswith("3 rows: 1 bad, 0 contaminated, 1 notes\n")
    assert "stored 2 prompts and 1 trajectories; already there: 0 and 0\n" in out
    assert "1 solutions left out: token ids need a tokenizer\n" in out
    assert "stored 0 prompts and 0 trajectories; already there: 2 and 1\n" in run(capsys, *given)[1]
    status, out, err = run(capsys, "export", "--store", store, tmp_path / "out.jsonl")
    assert (status, out, err) == (0, f"2 rows in {tmp_path / 'out.jsonl'}\n", "")
    other = tmp_path / "other.db"
    status, out, err = run(capsys, "import", tmp_path / "out.jsonl", "--store", other)
    assert (status, err) == (0, "")
    assert contents(TrajectoryStore(other)) == contents(TrajectoryStore(store))


def test_a_strict_import_stores_nothing_of_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_rows(tmp_path / "good.jsonl", {"prompt": "good"})
    bad = write_rows(tmp_path / "bad.jsonl", {"prompt": "lost"}, "[]", {"prompt": "b", "tests": []})
    store = tmp_path / "store.db"
    status, out, err = run(capsys, "import", good, bad, "--store", store, "--strict")
    assert status == 1
    assert f"{bad}:2: bad: a row must be an object, got []" in err
    assert f"{bad}:3: bad: tests must be an object with a kind" in err
    assert f"{bad}: 2 bad rows; nothing is stored" in err
    assert "4 rows: 2 bad" in out
    assert [prompt.content for prompt in TrajectoryStore(store).prompts()] == ["good"]


def test_what_the_commands_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, store = write_rows(tmp_path / "rows.jsonl", {"prompt": "a"}), tmp_path / "store.db"
    for extra, reason in (
        (["--origin", "nobody"], "--origin must be human"),
        (["--tokenizer", str(tmp_path / "none")], "must be an existing folder"),
        (["--overlap", "0"], "overlap must be a number > 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(capsys, "import", path, "--store", store, *extra)
        assert stop.value.code == 2 and reason in capsys.readouterr().err
    for arguments, reason in (
        (["import", tmp_path / "none.jsonl", "--store", store], "none.jsonl"),
        (["import", tmp_path / "rows.csv", "--store", store], "must end in .jsonl"),
        (["import", path, "--store", tmp_path / "no" / "store"], "an existing folder"),
        (["export", tmp_path / "out.jsonl", "--store", tmp_path / "gone.db"], "there is no store"),
        (["export", tmp_path / "out.csv", "--store", store], "must end in .jsonl"),
        (["export", tmp_path / "o.jsonl", "--store", store, "--min-reward", "nan"], "got nan"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1 and reason in err and err.startswith("spo: error: ")
    assert not (tmp_path / "gone.db").exists()


def test_parquet_without_pyarrow_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").touch()
    store = tmp_path / "store.db"
    status, _, err = run(capsys, "import", tmp_path / "rows.parquet", "--store", store)
    assert status == 1 and "pip install 'spo_ext[parquet]'" in err
    status, _, err = run(capsys, "export", tmp_path / "out.parquet", "--store", store)
    assert status == 1 and "pip install 'spo_ext[parquet]'" in err
