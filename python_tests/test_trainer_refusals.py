"""What the trainer does not take, evaluations beside training, and runs that are alike."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import dev_prompts, fill, make_model, make_tokenizer
from trainer_process import settings, train

from spo_ext.models import evaluating
from spo_ext.rollout import ModelGenerator
from spo_ext.store import TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer

OFFLINE = {"mixture": "offline", "rollouts": "none"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
        dev_prompts(store)
    return tmp_path


def make(folder: Path, changes: dict[str, Any], **options: Any) -> SPOTrainer:
    config = SPOConfig(**settings(folder, **{**OFFLINE, **changes}))
    return SPOTrainer(make_model(), config, make_tokenizer(), **options)


@pytest.mark.parametrize(
    "name", ["train_dataset", "eval_dataset", "data_collator", "compute_loss_func"]
)
def test_data_of_others_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"SPOTrainer: {name} must be left out: data and loss"):
        make(folder, {}, **{name: lambda *_: 0})


def test_what_has_no_meaning_is_refused(folder: Path) -> None:
    trainer = make(folder, {})
    with pytest.raises(NotImplementedError, match="predict has no meaning here"):
        trainer.predict([{}])
    with pytest.raises(ValueError, match="eval_dataset must be None"):
        trainer.evaluate(["1+1="])


def test_the_bar_shows_two_numbers_of_forty(folder: Path, capsys: Any) -> None:
    trainer = make(folder, {"disable_tqdm": False, "max_steps": 1})
    trainer.train()
    shown = capsys.readouterr()
    assert "loss=" in shown.err and "spo/residual" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_samples": 2}, r"eval_k must be at most eval_samples 2, got \[1, 10\]"),
        ({"eval_split": "test"}, "eval_split must be a split with prompts in the store"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_the_first_step(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make(folder, {"eval_strategy": "steps", "eval_steps": 2, **changes})


def test_evaluation_before_and_between_and_the_best_checkpoint(folder: Path) -> None:
    changes = {
        "eval_samples": 2,
        "eval_k": [1],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "save_strategy": "best",
        "save_total_limit": 1,
        "metric_for_best_model": "eval_num_tokens",
        "load_best_model_at_end": True,
        "learning_rate": 1e-2,
    }
    trainer = make(folder, changes)
    assert set(trainer.evaluate()) >= {"eval_pass@1", "eval_num_tokens"}
    trainer.train()
    history = [line for line in trainer.state.log_history if "eval_num_tokens" in line]
    lengths = {line["step"]: line["eval_num_tokens"] for line in history}
    assert set(lengths) == {0, 1, 2, 3, 4}
    best = max((1, 2, 3, 4), key=lambda step: (lengths[step], -step))
    assert trainer.state.best_model_checkpoint == str(folder / "run" / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_num_tokens"] == lengths[best]
    # With save_strategy best the newest checkpoint is the best, and one is kept.
    kept = [path.name for path in (folder / "run").glob("checkpoint-*")]
    assert kept == [f"checkpoint-{best}"]


def test_versions_keep_their_numbers_when_a_run_goes_on(folder: Path) -> None:
    saved = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make(folder, saved).train()
    with pytest.raises(ValueError, match="sync_every must be 1 as in the checkpoint, got 2"):
        make(folder, {**saved, "sync_every": 2}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="batch_size must be 8 as when 'run' drew before, got 16"):
        make(folder, {**saved, "per_device_train_batch_size": 16}).train(True)
    with pytest.raises(ValueError, match="mixture must be .*offline.* as when 'run' drew before"):
        online = {"mixture": "half-online", "rollouts": "embedded"}
        make(folder, {**saved, **online}).train(True)
    make(folder, {**saved, "max_steps": 3}).train(True)


def test_equal_runs_in_two_stores_are_equal(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with TrajectoryStore(tmp_path / "other" / "store.db") as store:
        fill(store)
    ends = []
    for place in (folder, tmp_path / "other"):
        torch.manual_seed(len(ends))  # what was drawn before does not matter
        options = {"mixture": "half-online", "shape": {"attention_dropout": 0.1}, "max_steps": 3}
        ends.append(train(settings(place, **options)))
    assert all(torch.equal(w, ends[1]["weights"][name]) for name, w in ends[0]["weights"].items())
    for line, other in zip(ends[0]["log"], ends[1]["log"], strict=True):
        for name, value in line.items():
            if not name.startswith("time/") and "seconds" not in name and "per_second" not in name:
                assert repr(other[name]) == repr(value), name  # some are nan


def test_the_password_of_a_database_is_not_passed_on(tmp_path: Path) -> None:
    options = settings(tmp_path, **OFFLINE, store="postgresql://me:secret@host/db")
    config = SPOConfig(**options)
    assert config.store == "postgresql://me:secret@host/db"
    assert json.loads(config.to_json_string())["store"] == "postgresql://me:***@host/db"
    assert "secret" not in str(config.to_sanitized_dict())


def test_eval_mode_ends_as_each_module_was() -> None:
    model = make_model().train()
    frozen = model.model.layers[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.model.layers[1].training and not frozen.mlp.training


def test_generation_makes_the_models_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with GPU 0 as its current one, whatever rank it is on."""
    from spo_ext.rollout import Sampling, embedded
    from spo_ext.store import Prompt

    entered: list[tuple[Any, int]] = []

    class Entered:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append((self.device, threading.get_ident()))

        def __exit__(self, *_error: object) -> None:
            pass

    monkeypatch.setattr(embedded.torch.cuda, "device", Entered)
    assert embedded._on(torch.device("cpu")).__enter__() is None and not entered
    monkeypatch.setattr(embedded, "_on", lambda device, on=embedded._on: on(_as_gpu(device)))
    ModelGenerator(make_model(), make_tokenizer()).generate(
        [Prompt("1", [4])], Sampling(max_new_tokens=2)
    )
    assert entered == [(torch.device("cuda:3"), threading.get_ident())]


def _as_gpu(device: torch.device) -> torch.device:
    assert device.type == "cpu"
    return torch.device("cuda:3")


def test_a_log_line_that_a_crash_cut_off_does_not_spoil_the_log(folder: Path) -> None:
    from spo_ext.durable import read_json_lines

    log = folder / "run" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    make(folder, {}).train()
    lines = list(read_json_lines(log))
    assert lines[0] == {"step": 1, "loss": 1.0}
    assert [line["step"] for line in lines[1:] if "loss" in line] == [1, 2, 3, 4]
