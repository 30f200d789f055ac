"""spo eval: its files, its table, its place in the store, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("transformers")

from data_cases import contents
from evaluation_cases import BAD, GOOD, LOST, Scripted, Workplace, judge, lines

from spo_ext.cli import main
from spo_ext.evaluation import producers


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


def test_samples_go_to_the_store_once(place: Workplace, generator: Scripted) -> None:
    generator.numbers = range(10, 12)
    command = place.arguments("--run", "first", "--policy-version", "7", "--top-p", "0.9")
    assert main(command) == 0
    rows = [json.loads(line) for line in lines(place.out / "samples.jsonl")]
    stored = list(place.store.trajectories(run="first/eval"))
    judged = [(row["prompt_id"], *row["token_ids"], row["finish"]) for row in rows if row["reward"]]
    assert len(judged) > len(set(judged)), "equal completions are a row each"
    assert sorted((row.prompt_id, *row.token_ids, row.finish) for row in stored) == sorted(judged)
    assert {row.origin.policy_version for row in stored} == {7}
    assert {(row.temperature, row.top_p) for row in stored} == {(1.0, 0.9)}
    assert {row.reward for row in stored} == {1.0, 0.25}
    assert stored[0].behaviour_logprobs is not None
    before = contents(place.store)
    assert main(command) == 0
    assert contents(place.store) == before
    assert place.store.counters()["duplicates"] == 0


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


def test_the_sum_of_several_rewards(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producers, "make_generator", lambda *_: Scripted((GOOD, BAD)))
    file = place.out.parent / "mine.py"
    file.write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    several = ["--reward", f"{file}:one", "--reward-weights", "1", "2"]
    command = [f"{file}:one" if word == "judge" else word for word in place.arguments(*several)]
    assert main(command) == 0
    found = place.evaluation()
    assert found["settings"]["reward"] == [f"{file}:one"] * 2
    assert found["settings"]["reward_weights"] == [1.0, 2.0]
    means = {name: found["values"][name]["mean"] for name in ("reward", "rewards/one_2/mean")}
    assert means == {"reward": 3.0, "rewards/one_2/mean": 1.0}
    assert main(command) == 0, "read again from the file of samples"
    assert place.evaluation()["values"] == found["values"]
