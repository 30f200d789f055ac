"""A store with too little for a step: what the trainer waits for, and what it does not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import fill, make_model, make_tokenizer
from trainer_process import settings

from spo_ext.store import SampleShortfall, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer


def train(folder: Path, **options: Any) -> None:
    """Groups of four, and three offline completions of each prompt."""
    with TrajectoryStore(folder / "store.db") as store:
        fill(store, prompts=4, each=3)
    config = SPOConfig(**settings(folder, mixture="half-online", **options))
    SPOTrainer(make_model(), config, make_tokenizer()).train()


def test_rollouts_do_not_help_the_offline_pool(tmp_path: Path) -> None:
    with pytest.raises(SampleShortfall, match=r"'offline': \(4, 0\).*; rollouts add to online"):
        train(tmp_path)
    with TrajectoryStore(tmp_path / "store.db") as store:
        drawn = sum(1 + row.duplicates for row in store.trajectories(run="run"))
    assert drawn == 4, "only the round that the policy version begins with"


def test_waiting_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="spo_ext.trainer.feed")
    with pytest.raises(SampleShortfall, match="waited 1.5 s for spo rollout") as raised:
        train(tmp_path, rollouts="external", wait_seconds=1.5)
    assert raised.value.pools == ("offline", "online")
    said = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("waiting up to 1.5 s for trajectories: Sampler: the store must hold")
