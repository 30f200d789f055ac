"""A run that is killed anywhere continues to the weights that it would have had."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import fill
from trainer_process import settings, spawn

from spo_ext.store import TrajectoryStore

RUN = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "sync_every": 4,
    "mixture": "half-online",
    "rollout_batch_size": 1,
    "shape": {"attention_dropout": 0.1},
}


# As one who was killed meets them: none, one and several checkpoints; a batch that is drawn anew.
KILLS = [
    {"where": "append", "step": 2},  # it rolls out, one prompt at a time
    {"where": "step", "step": 1},  # before the first checkpoint
    {"where": "draw", "step": 3},  # the batch is recorded, nothing was learned from it
    {"where": "checkpoint", "step": 4},  # the checkpoint is torn
    {"where": "step", "step": 4},  # right after a checkpoint, where a version begins
    {"where": "step", "step": 5},
]


def test_killed_and_resumed_again_and_again(tmp_path: Path) -> None:
    whole, folder = make_folder(tmp_path / "whole"), make_folder(tmp_path / "a")
    assert run(whole, out=str(whole / "end.pt")) == 0
    held: set[int] = set()
    for i, kill in enumerate(KILLS):
        assert run(folder, kill=kill, resume=i > 0) == -signal.SIGKILL, kill
        with TrajectoryStore(folder / "store.db") as store:
            found = {row.id for row in store.trajectories()}
            drawn = sum(1 for _ in store.trajectories(run="run"))
        assert held <= found
        assert i > 0 or 0 < drawn <= 8
        held = found
    assert run(folder, resume=True, out=str(folder / "end.pt")) == 0
    with TrajectoryStore(folder / "store.db") as store:
        assert held <= {row.id for row in store.trajectories()}
    end, expected = torch.load(folder / "end.pt"), torch.load(whole / "end.pt")
    for name, weight in expected["weights"].items():
        assert torch.equal(end["weights"][name], weight), name
    losses = [{line["step"]: line["loss"] for line in one["log"]} for one in (end, expected)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    learned = [[line["cost/learned_tokens"] for line in one["log"]] for one in (end, expected)]
    assert learned[0][-1] == learned[1][-1] > 6 * 8 * 5  # rows of at least a prompt of five tokens
    assert learned[1] == sorted(learned[1])


def run(folder: Path, **options: Any) -> int:
    """The exit status, in a process of its own."""
    return spawn(settings(folder, **RUN, **options)).wait(600)


def make_folder(path: Path) -> Path:
    path.mkdir()
    with TrajectoryStore(path / "store.db") as store:
        fill(store)
    return path
