"""spo eval: its files, its table, and what an interrupted one leaves."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("transformers")

import evaluation_cases as cases  # noqa: E402
from data_cases import contents, save_tokenizer  # noqa: E402
from evaluation_cases import BAD, GOOD, LOST, Scripted, fill, judge, lines  # noqa: E402

from spo_ext.cli import main  # noqa: E402
from spo_ext.evaluation import producers  # noqa: E402
from spo_ext.evaluation.journal import Journal  # noqa: E402
from spo_ext.evaluation.records import Sample  # noqa: E402
from spo_ext.rollout import Sampling  # noqa: E402
from spo_ext.store import TrajectoryStore  # noqa: E402


class Workplace:
    """A store of 5 test prompts, a folder that stands for a model, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.db = folder, folder / "out", folder / "store.db"
        self.model = save_tokenizer(folder / "model")
        self.store = TrajectoryStore(self.db)
        fill(self.store, 5)

    def arguments(self, *more: str) -> list[str]:
        paths = {"--store": self.db, "--model": self.model, "--out": self.out, "--reward": "judge"}
        given = [str(part) for pair in paths.items() for part in pair]
        return ["eval", *given, "--n", "4", "--k", "1,2", "--batch-size", "8", *more]

    def evaluation(self) -> Any:
        return json.loads((self.out / "evaluation.json").read_text())


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted((GOOD, BAD, LOST))
    monkeypatch.setattr(producers, "make_generator", lambda *_: scripted)
    monkeypatch.setattr(producers, "make_reward", lambda _: judge)
    return scripted


def test_files_and_table(place: Workplace, generator: Scripted, capsys: Any) -> None:
    assert main(place.arguments("--temperature", "0.7", "--seed", "3")) == 0
    rows = [json.loads(line) for line in lines(place.out / "samples.jsonl")]
    found = place.evaluation()
    assert [row["prompt"] for row in rows] == [f"test {i} <&>" for i in range(5) for _ in range(4)]
    for row in rows:
        # Bytes are tokens of this tokenizer, so these ids have a text of their own.
        assert row["reward"] == {GOOD: 1.0, BAD: 0.25, LOST: None}[row["token_ids"][0]]
    judged = [row for row in rows if row["reward"] is not None]
    by_prompt = [[row["reward"] for row in judged if row["prompt_id"] == i] for i in range(1, 6)]
    counts = [{"n": len(row), "c": row.count(1.0)} for row in by_prompt]
    assert [{"n": row["n"], "c": row["c"]} for row in found["per_prompt"]] == counts
    assert found["unjudged"] == 20 - len(judged) > 0
    shares = [row["c"] / row["n"] for row in counts if row["n"]]
    assert found["values"]["pass@1"]["mean"] == pytest.approx(sum(shares) / len(shares))
    assert found["settings"]["temperature"] == 0.7 and found["k"] == [1, 2]
    assert {"torch", "transformers", "python"} <= set(found["versions"])
    printed = capsys.readouterr().out
    assert f"{sum(shares) / len(shares):.3f}" in printed
    assert f"{found['unjudged']} of 20 completions could not be judged" in printed
    assert [(len(ids), sampling.n) for ids, sampling in generator.calls] == [(2, 4), (2, 4), (1, 4)]


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


def test_samples_go_to_the_store_once(place: Workplace, generator: Scripted) -> None:
    command = place.arguments("--run", "first", "--policy-version", "7", "--top-p", "0.9")
    assert main(command) == 0
    rows = [json.loads(line) for line in lines(place.out / "samples.jsonl")]
    stored = list(place.store.trajectories(run="first/eval"))
    judged = {(row["prompt_id"], *row["token_ids"], row["finish"]) for row in rows if row["reward"]}
    assert {(row.prompt_id, *row.token_ids, row.finish) for row in stored} == judged
    assert {row.origin.policy_version for row in stored} == {7}
    assert {(row.temperature, row.top_p) for row in stored} == {(1.0, 0.9)}
    assert {row.reward for row in stored} == {1.0, 0.25}
    assert stored[0].behaviour_logprobs is not None
    before = contents(place.store)
    assert main(command) == 0
    assert contents(place.store) == before
    assert place.store.counters()["duplicates"] == 0


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "1,5"], "--k must be at most --n = 4, got 5"),
        (["--k", "x"], "must be numbers like 1,10, got 'x'"),
        (["--run", "r"], "--policy-version must be given"),
        (["--policy-version", "1"], "--run must be given"),
        (["--run", "r", "--policy-version", "1", "--split", "train"], "must be dev or test"),
        (["--batch-size", "0"], "--batch-size must be an integer >= 1"),
        (["--prompts", "0"], "--prompts must be an integer >= 1"),
        (["--temperature", "0"], "temperature must be a number > 0"),
        (["--served-model", "m"], "--served-model must be given with --server"),
        (["--server", "http://localhost:1"], "not allowed with argument --model"),
        (["--model", "nowhere"], "--model must be an existing folder, got 'nowhere'"),
    ],
)
def test_arguments_that_cannot_work_end_with_status_2(
    place: Workplace, generator: Scripted, more: list[str], message: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(place.arguments(*more))
    assert message in capsys.readouterr().err
    assert not generator.calls and not place.out.exists()


def test_servers_need_a_name_a_tokenizer_and_their_key(
    place: Workplace, generator: Scripted, capsys: Any
) -> None:
    url = "http://me:secret@localhost:1/v1"
    command = ["eval", "--store", str(place.db), "--out", str(place.out), "--server", url]
    tokenizer = ["--tokenizer", str(place.model)]
    for more, message in (
        (tokenizer, "--served-model must be given with --server"),
        (["--served-model", "m"], "--tokenizer must be given with --server"),
        (
            [*tokenizer, "--served-model", "m", "--api-key-from", "NO_SUCH_KEY"],
            "--api-key-from must name a variable of the environment, got NO_SUCH_KEY",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*command, *more])
        assert message in capsys.readouterr().err
    assert main([*command, *tokenizer, "--served-model", "m"]) == 0
    settings = (place.out / "settings.json").read_text()
    assert "secret" not in settings and '"model": "m"' in settings


def test_an_empty_split_and_a_missing_store_fail(
    place: Workplace, generator: Scripted, capsys: Any
) -> None:
    assert main(place.arguments("--split", "dev")) == 1
    assert "the store has no prompts of split dev" in capsys.readouterr().err
    assert main(place.arguments("--store", str(place.folder / "no.db"))) == 1
    assert "there is no store" in capsys.readouterr().err
    assert not (place.folder / "no.db").exists()


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


def start(seconds: float, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROCESS, str(seconds), *arguments]
    return subprocess.Popen(
        command, env=cases.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


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
