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

RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "sync_every": 4}


def run(folder: Path, **options: Any) -> int:
    """The exit status, in a process of its own."""
    process = spawn(settings(folder, **RUN, **options))
    process.join(600)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return int(process.exitcode)


def make_folder(path: Path) -> Path:
    path.mkdir()
    with TrajectoryStore(path / "store.db") as store:
        fill(store)
    return path


MIXTURE = {"mixture": "half-online", "shape": {"attention_dropout": 0.1}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_folder(tmp_path_factory.mktemp("whole") / "a")
    assert run(folder, **MIXTURE, out=str(folder / "end.pt")) == 0
    return dict(torch.load(folder / "end.pt"))


@pytest.mark.parametrize(
    "kill",
    [
        {"where": "step", "step": 1},  # before the first checkpoint
        {"where": "draw", "step": 3},  # the batch is recorded, nothing was learned from it
        {"where": "step", "step": 4},  # right after a checkpoint, where a version begins
        {"where": "checkpoint", "step": 4},  # the checkpoint is torn
        {"where": "step", "step": 5},
    ],
    ids=lambda kill: f"{kill['where']}-{kill['step']}",
)
def test_killed_and_resumed(
    tmp_path: Path, uninterrupted: dict[str, Any], kill: dict[str, Any]
) -> None:
    folder = make_folder(tmp_path / "a")
    assert run(folder, **MIXTURE, kill=kill) == -signal.SIGKILL
    with TrajectoryStore(folder / "store.db") as store:
        held = {row.id for row in store.trajectories()}
    assert run(folder, **MIXTURE, resume=True, out=str(folder / "end.pt")) == 0
    end = torch.load(folder / "end.pt")
    for name, weight in uninterrupted["weights"].items():
        assert torch.equal(end["weights"][name], weight), name
    expected = {line["step"]: line["loss"] for line in uninterrupted["log"]}
    assert {line["step"]: line["loss"] for line in end["log"]} == expected
    with TrajectoryStore(folder / "store.db") as store:
        assert held <= {row.id for row in store.trajectories()}


def test_killed_while_it_rolls_out(tmp_path: Path) -> None:
    """One prompt a batch, and killed after two: the rest is drawn as it would have been."""
    options = {**MIXTURE, "rollout_batch_size": 1}
    whole, folder = make_folder(tmp_path / "whole"), make_folder(tmp_path / "a")
    assert run(whole, **options, out=str(whole / "end.pt")) == 0
    assert run(folder, **options, kill={"where": "append", "step": 2}) == -signal.SIGKILL
    with TrajectoryStore(folder / "store.db") as store:
        assert 0 < sum(1 for _ in store.trajectories(run="run")) <= 8
    assert run(folder, **options, resume=True, out=str(folder / "end.pt")) == 0
    ends = [torch.load(path / "end.pt")["weights"] for path in (whole, folder)]
    for name, weight in ends[0].items():
        assert torch.equal(ends[1][name], weight), name
