"""What a training run left in its folder."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_ext.durable import read_json, read_json_lines

_NO_METRICS = {"step", "epoch", "total_flos", "num_input_tokens_seen"}
_STATE = "trainer_state.json"
_STATE_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size", "save_steps")


@dataclass(frozen=True)
class Series:
    """A metric at rising optimiser steps; dropped counts values that were not finite."""

    steps: list[int]
    values: list[float]
    dropped: int = 0


@dataclass(frozen=True)
class Saved:
    """An evaluation on disk: its folder's name, evaluation.json, and samples.jsonl or None."""

    name: str
    result: dict[str, Any]
    samples: Path | None

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Per prompt how many samples were judged and how many passed."""
        return [(int(row["n"]), int(row["c"])) for row in self.result["per_prompt"]]


@dataclass(frozen=True)
class Run:
    """checkpoint is the folder of the last one, None without any."""

    folder: Path
    series: dict[str, Series]
    settings: dict[str, Any]
    evaluations: list[Saved]
    checkpoint: Path | None

    @property
    def step(self) -> int:
        """The last that something was logged at."""
        return max((series.steps[-1] for series in self.series.values()), default=0)

    @property
    def name(self) -> str:
        """What the store calls it: as in its settings, else its folder."""
        given = self.settings.get("run") or self.settings.get("run_name")
        return str(given) if given else self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """Reads the last trainer_state.json, metrics.jsonl, settings and evaluations.

    metrics.jsonl counts from its first step on. A line in it of an earlier step than the one before
    comes from a run that was resumed, and takes the place of what was logged from that step on.

    Raises ValueError if there is no such folder or nothing of a run in it, or a file is broken.
    """
    if not folder.is_dir():
        raise ValueError(f"report: RUN_DIR must be an existing folder, got {str(folder)!r}")
    checkpoint = last_checkpoint(folder)
    state = _state(folder, checkpoint)
    lines = _current(read_json_lines(folder / "metrics.jsonl")) if _has(folder) else []
    first = min((_step(line) for line in lines), default=math.inf)
    history = [line for line in state.get("log_history", []) if _step(line) < first]
    evaluations = _evaluations(folder)
    if not history and not lines and not evaluations:
        raise ValueError(
            f"report: RUN_DIR must hold {_STATE}, metrics.jsonl or evaluation*/evaluation.json, "
            f"got {str(folder)!r} without"
        )
    settings = _settings(folder, state)
    return Run(folder, collect([*history, *lines]), settings, evaluations, checkpoint)


def last_checkpoint(folder: Path) -> Path | None:
    """The one with the largest step among those that are complete enough to have a state."""
    found = {
        int(path.name.partition("-")[2]): path
        for path in folder.glob("checkpoint-*")
        if path.name.partition("-")[2].isdecimal() and (path / _STATE).is_file()
    }
    return found[max(found)] if found else None


def collect(lines: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Numbers by name; a later line of the same step wins."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in _NO_METRICS and isinstance(value, int | float):
                found.setdefault(name, {})[_step(line)] = float(value)
    series = {}
    for name, points in found.items():
        kept = sorted((step, value) for step, value in points.items() if math.isfinite(value))
        if kept:
            steps, values = zip(*kept, strict=True)
            series[name] = Series(list(steps), list(values), len(points) - len(kept))
    return series


def _has(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file()


def _step(line: Mapping[str, Any]) -> int:
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"report: step of a log line must be an integer, got {step!r}")
    return step


def _current(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a run logged after the checkpoint that it was resumed from."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        while kept and _step(kept[-1]) > _step(line):
            kept.pop()
        kept.append(line)
    return kept


def _state(folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    paths = [folder / _STATE, *([checkpoint / _STATE] if checkpoint else [])]
    states = [read_json(path) for path in paths if path.is_file()]
    return max(states, key=lambda state: int(state.get("global_step", 0)), default={})


def _settings(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("spo_config.json", "training_args.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    # training_args.bin is a pickle, and to read one is to run it.
    return {name: state[name] for name in _STATE_SETTINGS if name in state}


def _evaluations(folder: Path) -> list[Saved]:
    """By name, numbers in it by their size."""
    paths = [path for path in folder.glob("evaluation*/evaluation.json") if path.is_file()]
    found = []
    for path in sorted(paths, key=lambda path: _natural(path.parent.name)):
        result = read_json(path)
        if not isinstance(result.get("per_prompt"), list):
            raise ValueError(f"{path}: per_prompt must be a list, got {result.get('per_prompt')!r}")
        samples = path.with_name("samples.jsonl")
        found.append(Saved(path.parent.name, result, samples if samples.is_file() else None))
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part or 0), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", name)
    ]
