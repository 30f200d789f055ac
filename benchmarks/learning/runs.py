"""A run: one method in one setting with one pair of seeds, and the JSON file that it leaves."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from spo_ext.contests.problems import Split
from spo_ext.sandbox import Sandbox

from .clock import Clock
from .evaluation import evaluate
from .judging import Grader
from .learner import Learner, Task
from .method import Method
from .methods import METHODS, method_named
from .references import load_reference, reference_key, write_text
from .sampling import Sampled
from .settings import Setting, setting_named

sys.path.insert(0, str(Path(__file__).parents[1]))
import machine

_EARLIER_SEED = 1_000  # of the run whose trajectories are the "own" offline data


@dataclass(frozen=True)
class Run:
    """setting and method by name, see `setting_named` and `method_named`."""

    setting: str
    method: str
    reference_seed: int
    seed: int
    steps: int
    split: Split

    def file(self, results: Path) -> Path:
        """The digest is of all settings: a method that was changed is run again."""
        parts = [asdict(setting_named(self.setting)), asdict(method_named(self.method))]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9.=-]", "_", self.method)
        seeds = f"r{self.reference_seed}-s{self.seed}"
        folder = results / self.setting
        return folder / f"{name}-{seeds}-{self.steps}-{self.split}-{digest}.json"

    def __str__(self) -> str:
        return f"{self.setting} {self.method} r{self.reference_seed} s{self.seed}"


def restore(records: Iterable[dict[str, Any]], results: Path) -> int:
    """Makes runs of committed records count as done; returns how many.

    Left out are those whose method or setting has meant something else since.
    """
    restored = 0
    for record in records:
        run = Run(**{field.name: record[field.name] for field in fields(Run)})
        path, setting = run.file(results), setting_named(run.setting)
        then = record["setting_settings"]
        now: list[tuple[Any, dict[str, Any]]] = [
            (method_named(run.method), record["method_settings"]),
            (setting, {**then, "config": setting.config}),
            (setting.config, then["config"]),
        ]
        if path.exists() or not all(_agree(*pair) for pair in now):
            continue
        write_text(path, json.dumps(record, indent=1))
        restored += 1
    return restored


def _agree(now: Any, then: dict[str, Any]) -> bool:
    """A field that there was not then has to be as it is by default."""
    return all(
        getattr(now, field.name) == then.get(field.name, field.default)
        for field in fields(now)
        if field.name not in ("name", "about")
    )


def perform(run: Run, results: Path, cache: Path) -> Path:
    """Runs it unless its file is there. The same run gives the same curve on one machine.

    Raises SandboxError where sampled programs cannot be isolated.
    """
    path = run.file(results)
    if not path.exists():
        write_text(path, json.dumps(_record(run, cache), indent=1))
    return path


def _record(run: Run, cache: Path) -> dict[str, Any]:
    setting, method = setting_named(run.setting), method_named(run.method)
    commit = machine.commit()  # now: somebody may commit while it runs
    begin, workers = time.perf_counter(), setting.config.sandbox_workers
    clock, curve = Clock(), Curve()
    torch.set_num_threads(setting.config.threads)
    with torch.random.fork_rng(devices=[]), Sandbox(workers=workers) as sandbox:
        grader = Grader(sandbox)
        learner = _learner(run, setting, method, cache, grader, clock)
        held_out = setting.problems(run.split, run.reference_seed)

        def look(step: int) -> None:
            with clock.stage("evaluation"):
                found = evaluate(
                    learner.policy,
                    learner.origin,
                    learner.reference,
                    held_out,
                    grader,
                    setting.config,
                    run.seed,
                    method.softness,
                )
            curve.add(step, clock, found)

        def after_step(step: int, values: dict[str, float]) -> None:
            curve.note(values)
            if step % max(1, run.steps // setting.evaluations) == 0 or step == run.steps:
                look(step)

        look(0)
        learner.run(run.steps, after_step)
    return {
        **asdict(run),
        "method_settings": asdict(method),
        "setting_settings": asdict(setting),
        "reference": reference_key(setting, run.reference_seed),
        "commit": commit,
        "processor": machine.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "curve": curve.points,
        "seconds": clock.seconds,
        "wall_seconds": time.perf_counter() - begin,
    }


class Curve:
    """Evaluations in order, each with the means of what was logged since the one before."""

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self._noted: list[dict[str, float]] = []

    def note(self, values: dict[str, float]) -> None:
        """What one update logged."""
        self._noted.append(values)

    def add(self, step: int, clock: Clock, found: dict[str, Any]) -> None:
        """An evaluation, with what the run had used by then."""
        names = sorted({name for values in self._noted for name in values})
        columns = {name: [v[name] for v in self._noted if name in v] for name in names}
        training = {name: sum(column) / len(column) for name, column in columns.items()}
        used = {"step": step, "sampled": clock.sampled, "updates": clock.updates}
        spent = sum(seconds for stage, seconds in clock.seconds.items() if stage != "evaluation")
        self.points.append({**used, "training_seconds": spent, **found, "training": training})
        self._noted = []


def _learner(
    run: Run, setting: Setting, method: Method, cache: Path, grader: Grader, clock: Clock
) -> Learner:
    earlier = _earlier(run, setting, cache, grader) if method.offline == "own" else []
    reference = load_reference(setting, run.reference_seed, cache)
    problems = setting.problems("train", run.reference_seed)
    torch.manual_seed(run.seed)
    return Learner(Task(setting, problems, grader, clock, run.seed, earlier), method, reference)


def _earlier(run: Run, setting: Setting, cache: Path, grader: Grader) -> list[Sampled]:
    """What a run of the method "group" as long as this one sampled, from the cache or made now."""
    method = METHODS["group"]
    parts = [reference_key(setting, run.reference_seed), asdict(setting), asdict(method), run.steps]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"earlier-{digest}.json"
    if not path.exists():
        earlier = replace(run, method=method.name, seed=_EARLIER_SEED)
        learner = _learner(earlier, setting, method, cache, grader, Clock())
        learner.run(run.steps, _nothing)
        write_text(path, json.dumps([asdict(row) for row in learner.sampled]))
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        Sampled(**{**row, "program": tuple(row["program"]), "logprobs": tuple(row["logprobs"])})
        for row in rows
    ]


def _nothing(step: int, values: dict[str, float]) -> None:
    """An earlier run is not looked at."""
