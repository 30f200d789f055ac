"""spo eval that was interrupted, killed, or is asked again."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("transformers")

import warm  # noqa: E402
from data_cases import contents  # noqa: E402
from evaluation_cases import BAD, GOOD, LOST, Scripted, Workplace, fill, judge, lines  # noqa: E402

from spo_ext.cli import main  # noqa: E402
from spo_ext.evaluation import producers  # noqa: E402
from spo_ext.evaluation.records import Sample  # noqa: E402
from spo_ext.evaluation.stored import Journal  # noqa: E402
from spo_ext.rollout import Sampling  # noqa: E402
from spo_ext.store import TrajectoryStore  # noqa: E402


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted((GOOD, BAD, LOST))
    monkeypatch.setattr(producers, "make_generator", lambda *_: scripted)
    monkeypatch.setattr(producers, "make_reward", lambda _: judge)
    return scripted


def test_a_second_time_draws_nothing_and_may_ask_for_other_ks(
    place: Workplace, generator: Scripted
) -> None:
    assert main(place.arguments()) == 0
    before, calls = place.evaluation(), len(generator.calls)
    assert main(place.arguments()) == 0
    assert (place.evaluation(), len(generator.calls)) == (before, calls)
    assert main(place.arguments("--k", "3", "--success", "0.25")) == 0
    after = place.evaluation()
    assert len(generator.calls) == calls
    assert "pass@3" in after["values"] and "pass@1" not in after["values"]
    assert sum(row["c"] for row in after["per_prompt"]) == 20 - after["unjudged"]


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.55, 0.999])
def test_a_torn_file_continues_and_ends_the_same(
    place: Workplace, generator: Scripted, cut: float
) -> None:
    assert main(place.arguments()) == 0
    whole, before = (place.out / "samples.jsonl").read_bytes(), place.evaluation()
    generator.calls.clear()
    kept = whole[: int(len(whole) * cut)]
    (place.out / "samples.jsonl").write_bytes(kept)
    (place.out / "evaluation.json").unlink()
    assert main(place.arguments()) == 0
    assert (place.out / "samples.jsonl").read_bytes() == whole
    assert place.evaluation() == before
    finished = kept.count(b"\n") // 4
    assert len(generator.calls) == math.ceil((5 - finished) / 2)  # two prompts in a call


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--seed", "1"], "seed"),
        (["--n", "5"], "n"),
        (["--temperature", "0.5"], "temperature"),
        (["--prompts", "3"], "prompts"),
        (["--reward", "other"], "reward"),
        (["--test-seconds", "2"], "test_seconds"),
        (["--sandbox-packages", "numpy"], "sandbox_packages"),
    ],
)
def test_other_settings_are_refused(
    place: Workplace, generator: Scripted, more: list[str], name: str, capsys: Any
) -> None:
    assert main(place.arguments()) == 0
    samples, calls = lines(place.out / "samples.jsonl"), len(generator.calls)
    assert main(place.arguments(*more)) == 1
    assert f"holds an evaluation with {name} " in capsys.readouterr().err
    assert (lines(place.out / "samples.jsonl"), len(generator.calls)) == (samples, calls)


def test_other_prompts_and_other_weights_are_refused(
    place: Workplace, generator: Scripted, capsys: Any
) -> None:
    assert main(place.arguments("--prompts", "5")) == 0
    (place.model / "model.safetensors").write_bytes(b"trained on")
    assert main(place.arguments()) == 1
    assert "model_files" in capsys.readouterr().err
    (place.model / "model.safetensors").unlink()
    assert main(place.arguments()) == 0
    fill(place.store, 6)
    assert main(place.arguments()) == 1
    assert "prompts_hash" in capsys.readouterr().err


def test_what_a_killed_process_had_not_stored_yet_is_stored(
    place: Workplace, generator: Scripted
) -> None:
    command = place.arguments("--run", "first", "--policy-version", "7")
    assert main(command) == 0
    before, calls = contents(place.store), len(generator.calls)
    place.store.close()
    for path in place.folder.glob("store.db*"):
        path.unlink()
    place.store = TrajectoryStore(place.db)
    fill(place.store, 5)
    assert contents(place.store) != before
    assert main(command) == 0
    assert contents(place.store) == before and len(generator.calls) == calls


def test_a_prompt_is_on_disk_when_it_was_written(place: Workplace) -> None:
    prompts = list(place.store.prompts("test"))
    (row,) = Scripted().generate(prompts[:1], Sampling(n=2))
    with Journal(place.out, {"n": 2}, 2) as journal:
        journal.write(prompts[0], [Sample(generation, "words", None) for generation in row])
        written = lines(place.out / "samples.jsonl")
        assert [json.loads(line)["token_ids"] for line in written] == [
            list(generation.token_ids) for generation in row
        ]


_PROCESS = """
import sys
import evaluation_cases as cases
from spo_ext.evaluation import producers
from spo_ext.cli import main
seconds = float(sys.argv[1])
producers.make_generator = lambda *_: cases.Scripted((1, 0), seconds)
producers.make_reward = lambda _: cases.judge
sys.exit(main(sys.argv[2:]))
"""


def start(seconds: float, arguments: list[str]) -> warm.Process:
    command = ["-c", _PROCESS, str(seconds), *arguments]
    return warm.Process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_evaluation_continues(place: Workplace, generator: Scripted, capsys: Any) -> None:
    fill(place.store, 40)
    generator.verdicts = (GOOD, BAD)
    kept = ["--run", "first", "--policy-version", "0"]
    process = start(0.1, place.arguments(*kept))
    deadline = time.monotonic() + 60
    while len(lines(place.out / "samples.jsonl")) < 16:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert main(place.arguments(*kept)) == 1  # not two at once
    assert "another process evaluates into this folder" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = lines(place.out / "samples.jsonl")
    assert 16 <= len(left) < 160 and not (place.out / "evaluation.json").exists()
    assert main(place.arguments(*kept)) == 0
    assert sum(len(ids) for ids, _ in generator.calls) == 40 - len(left) // 4
    continued = lines(place.out / "samples.jsonl")
    assert continued[: len(left)] == left
    first, stored = place.evaluation(), contents(place.store)

    place.out = place.folder / "uninterrupted"
    assert main(place.arguments(*kept)) == 0
    assert lines(place.out / "samples.jsonl") == continued
    assert place.evaluation() == first and contents(place.store) == stored
