"""From files of data sets to a report, with every process killed on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import postgres_server
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from end_to_end_cases import DATA_SETS, SAME, TEST_PROMPTS, Workplace, contents, kill, workplace
from rollout_cases import wait_for

from spo_ext.cli import main
from spo_ext.store import TrajectoryStore
from spo_ext.trainer.checkpoints import last_complete, read_state

STEPS = 25
SECONDS = 600.0  # for what a process is waited for, on a busy machine


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workplace]:
    """On PostgreSQL, where it is installed; test_bring_your_own has such a run on SQLite."""
    target = str(tmp_path / "store.db")
    if postgres_server.missing() is None:
        target = postgres_server.new_schema(request.getfixturevalue("postgres"))
    with workplace(tmp_path, target) as made:
        yield made


def test_from_data_to_report(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    files = place.data_files()
    where = ("--store", place.store, "--tokenizer", str(place.policy))
    assert main(["import", *map(str, files), *where]) == 0
    assert "stored 46 prompts and 25 trajectories" in capsys.readouterr().out
    with TrajectoryStore(place.store) as store:
        train(place, store)
        check_store(store)
        check_metrics(place)
        check_checkpoint(place)
        evaluate(place)
        report(place)


def train(place: Workplace, store: TrajectoryStore) -> None:
    """25 steps; the producer is killed in the middle of version 5, then the trainer behind its
    second checkpoint, which without a producer cannot come to its third."""
    place.write_config(max_steps=STEPS, sync_every=2, save_steps=5)
    trainer, producer = place.start_trainer("trainer"), place.start_producer("producer")

    def reached(step: int) -> bool:
        return place.check_running() and step in place.metrics()

    wait_for(lambda: reached(1) and versions(store)[-1:] >= [5], SECONDS)
    kill(producer)
    held = contents(store)
    wait_for(lambda: reached(12), SECONDS)
    kill(trainer)
    assert max(place.metrics()) < 20, "the trainer went on without trajectories to learn from"
    held |= contents(store)

    trainer, producer = place.start_trainer("resumed", "--resume"), place.start_producer("again")
    assert trainer.wait(SECONDS) == 0
    assert producer.wait(SECONDS) == 0, "the end of the run must end its producer"
    found = contents(store)
    assert held == {key: found.get(key) for key in held}, "a stored trajectory is lost or changed"
    assert versions(store)[-1] >= STEPS // 2 - 1


def versions(store: TrajectoryStore) -> list[int]:
    """Of the policies that have trajectories, in order."""
    rows = store.trajectories(run="learner")
    return sorted({row.origin.policy_version or 0 for row in rows})


def check_store(store: TrajectoryStore) -> None:
    prompts = list(store.prompts())
    assert sum(prompt.tests is not None for prompt in prompts) == len(DATA_SETS)
    assert sum(prompt.answer is not None for prompt in prompts) == 24 + 2 * TEST_PROMPTS
    drawn = list(store.trajectories(run="learner"))
    assert {row.reward for row in drawn} == {0.0, 1.0}
    train_ids = {prompt.id for prompt in prompts if prompt.split == "train"}
    assert {row.prompt_id for row in drawn} <= train_ids
    assert store.counters()["draws"] == STEPS * 8, "a step has one batch, however often it is taken"


def check_metrics(place: Workplace) -> None:
    lines = place.metrics()
    assert sorted(lines) == list(range(1, STEPS + 1))
    replayed = {step: found for step, found in lines.items() if len(found) > 1}
    assert set(replayed) >= {11, 12}, "the steps after the last checkpoint"
    assert min(replayed) > 10, "a step before the last checkpoint was taken again"
    for step, (first, *others) in replayed.items():
        for name in SAME:
            assert all(first[name] == other[name] for other in others), (step, name)
    losses = [found[-1]["loss"] for found in lines.values()]
    assert len(set(losses)) > STEPS // 2 and all(loss == loss for loss in losses)
    shares = [found[-1]["store/offline_share"] for found in lines.values()]
    assert sum(shares) / STEPS == pytest.approx(0.5, abs=0.02)
    assert max(found[-1]["store/age_versions_max"] for found in lines.values()) == 1


def check_checkpoint(place: Workplace) -> None:
    from safetensors.torch import load_file

    last = last_complete(place.run)
    assert last is not None and last.name == f"checkpoint-{STEPS}"
    assert read_state(last)["global_step"] == STEPS
    final, saved, start = (
        load_file(folder / "model.safetensors") for folder in (place.run, last, place.policy)
    )
    assert all(torch.equal(final[name], saved[name]) for name in final)
    assert any(not torch.equal(final[name], start[name]) for name in final)


def evaluate(place: Workplace) -> None:
    """Killed when two prompts are done; their samples stay as they are."""
    samples = place.run / "evaluation" / "samples.jsonl"
    killed = place.start_evaluation("evaluation", HOLD_AFTER="2")
    wait_for(
        lambda: (
            place.check_running() and samples.exists() and samples.read_bytes().count(b"\n") >= 8
        ),
        SECONDS,
    )
    kill(killed)
    before = samples.read_bytes()
    assert before.count(b"\n") == 8
    assert place.start_evaluation("evaluation again").wait(SECONDS) == 0
    after = samples.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 4 * TEST_PROMPTS
    rows = [json.loads(line) for line in after.splitlines()]
    result = json.loads((place.run / "evaluation" / "evaluation.json").read_text())
    passed = sum(row["reward"] for row in rows) / len(rows)
    assert 0 < passed < 1
    assert result["values"]["pass@1"]["mean"] == pytest.approx(passed)
    assert result["values"]["pass@4"]["mean"] >= passed


def report(place: Workplace) -> None:
    where = ("--store", place.store, "--run", "learner")
    assert main(["report", str(place.run), *where]) == 0
    page = (place.run / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5
    for words in ("pass@1", "pass@4", f"optimiser step {STEPS}", "5+3=", "Newest trajectories"):
        assert words in page, words
    assert len(list((place.run / "report_curves").glob("*.png"))) >= 5
