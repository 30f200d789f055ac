"""A store for several rewards: completions are drawn only where the reward can judge them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import evaluation_cases
from evaluation_cases import BAD, GOOD, Workplace
from rollout_cases import Scripted, decode, rollout, save_policy

from spo_ext.cli import main
from spo_ext.evaluation import producers
from spo_ext.rollout.answers import AnswerReward
from spo_ext.store import Prompt, TrajectoryStore
from spo_ext.trainer import SPOConfig
from spo_ext.trainer.producer import Producer

TESTS = {"inputs": ["1"], "outputs": ["1"]}


def fill(path: Path) -> dict[str, int]:
    """Ids of a prompt with tests, of two with an answer, and of one with neither."""
    prompts = [
        Prompt("program", token_ids=[1], tests=TESTS),
        Prompt("sum", token_ids=[2], answer="3"),
        Prompt("empty", token_ids=[3], answer=""),
        Prompt("bare", token_ids=[4]),
    ]
    with TrajectoryStore(path) as store:
        return dict(
            zip(("program", "sum", "empty", "bare"), store.add_prompts(prompts), strict=True)
        )


def drawn(path: Path) -> set[int]:
    with TrajectoryStore(path) as store:
        return {row.prompt_id for row in store.trajectories()}


def test_rollout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, policy = tmp_path / "store.db", save_policy(tmp_path / "policy")
    ids = fill(path)
    options = ("--store", path, "--model", policy, "--run", "r", "--n", 2, "--max-new-tokens", 3)
    assert rollout(*options, "--reward", "answer") == 0
    assert drawn(path) == {ids["sum"], ids["empty"]}
    assert "4 trajectories of 2 prompts (0 drawn before, 0 without" in capsys.readouterr().out


def test_embedded_producer(tmp_path: Path) -> None:
    from accelerate import Accelerator

    path = tmp_path / "store.db"
    ids = fill(path)
    config = SPOConfig(
        output_dir=str(tmp_path / "run"),
        store=str(path),
        max_steps=1,
        per_device_train_batch_size=16,
        use_cpu=True,
        report_to="none",
    )
    with TrajectoryStore(path) as store:
        generator, accelerator = Scripted(), Accelerator(cpu=True)
        made = (AnswerReward(), decode, accelerator)
        Producer(config, store, generator, *made, replicated=False).round(0)
        assert {name for names, _ in generator.asked for name in names} == {"sum", "empty"}
        with TrajectoryStore(tmp_path / "bare.db") as bare:
            bare.add_prompt(Prompt("bare", token_ids=[1]))
            with pytest.raises(ValueError, match="prompts of split train with answer, got none"):
                Producer(config, bare, generator, *made, replicated=False)
    assert drawn(path) == {ids["sum"], ids["empty"]}


def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Workplace(tmp_path)  # five prompts with answers
    place.store.add_prompt(Prompt("bare", [1], split="test"))
    generator = evaluation_cases.Scripted((GOOD, BAD))
    monkeypatch.setattr(producers, "make_generator", lambda *_: generator)
    monkeypatch.setattr(producers, "make_reward", lambda _: AnswerReward())
    assert main(place.arguments()) == 0
    assert place.evaluation()["unjudged"] == 0
    assert len(place.evaluation()["per_prompt"]) == 5
