"""Many runs: the references first, then the runs in parallel, until they or the time are up."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spo_ext.contests.problems import Split

from .methods import method_named
from .references import make_reference, reference_key
from .runs import Run, perform
from .settings import setting_named


@dataclass
class Outcome:
    """files of the runs that are finished, in the order asked for; left: runs not begun, for lack
    of time; failed: what went wrong with each that raised."""

    files: list[Path] = field(default_factory=list)
    left: list[Run] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def plan(
    settings: Sequence[str],
    methods: Sequence[str],
    reference_seeds: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    split: Split,
) -> list[Run]:
    """All runs, those of the first seeds first: a sweep that is cut short has whole rows of them.

    A method "ppo@40" takes 40 steps instead. Raises ValueError for an unknown setting or method, or
    a number of steps that is none, before anything runs.
    """
    for setting in settings:
        setting_named(setting)
    lengths = [_length(method, steps) for method in methods]
    for method, _ in lengths:
        method_named(method)
    # Both seeds change together first, so that two pairs already vary both.
    pairs = sorted(product(reference_seeds, seeds), key=lambda pair: (max(pair), pair))
    return [
        Run(setting, method, reference_seed, seed, length, split)
        for reference_seed, seed in pairs
        for setting in settings
        for method, length in lengths
    ]


def _length(method: str, steps: int) -> tuple[str, int]:
    name, at, own = method.partition("@")
    if at and not (own.isdecimal() and int(own) > 0):
        raise ValueError(f"method {method}: @ must be followed by a number of steps, got {own!r}")
    return name, int(own) if at else steps


def sweep(
    runs: Sequence[Run],
    results: Path,
    cache: Path,
    workers: int,
    budget_minutes: float | None,
    quiet: bool = False,
) -> Outcome:
    """Runs what has no file yet.

    No run is begun that would end after the budget, going by the mean time of those before it. An
    error in one run leaves the others alone; killed, a sweep continues where it was.
    """
    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    context = multiprocessing.get_context("spawn")
    outcome = Outcome()
    waiting = [run for run in runs if not run.file(results).exists()]
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        references = list(dict.fromkeys((run.setting, run.reference_seed) for run in waiting))
        calls = [
            (f"reference {name} {seed}", partial(make_reference, setting_named(name), seed, cache))
            for name, seed in _different(references)
        ]
        _all(pool, calls, workers, None, "references", outcome, quiet)
        jobs = [(str(run), partial(perform, run, results, cache)) for run in waiting]
        begun = _all(pool, jobs, workers, deadline, "runs", outcome, quiet)
    outcome.left = waiting[begun:]
    outcome.files = [run.file(results) for run in runs if run.file(results).exists()]
    return outcome


def _different(references: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Settings that share a reference need it made only once."""
    keys = {reference_key(setting_named(name), seed): (name, seed) for name, seed in references}
    return list(keys.values())


def _all(
    pool: ProcessPoolExecutor,
    calls: Sequence[tuple[str, Callable[[], Any]]],
    workers: int,
    deadline: float | None,
    title: str,
    outcome: Outcome,
    quiet: bool,
) -> int:
    """Begins them in order, as many at a time as there are workers; returns how many it began."""
    active: dict[Future[Any], tuple[str, float]] = {}
    spent: list[float] = []
    begun = 0
    with tqdm(total=len(calls), desc=title, disable=quiet or not calls, mininterval=1.0) as bar:
        while begun < len(calls) or active:
            late = deadline is not None and time.monotonic() + _mean(spent) > deadline
            while begun < len(calls) and len(active) < workers and not late:
                name, call = calls[begun]
                active[pool.submit(call)] = (name, time.monotonic())
                begun += 1
            if not active:
                break
            done, _ = wait(active, return_when=FIRST_COMPLETED)
            for future in done:
                name, start = active.pop(future)
                spent.append(time.monotonic() - start)
                error = future.exception()
                if error is not None:
                    outcome.failed[name] = f"{type(error).__name__}: {error}"
                bar.set_postfix_str(name, refresh=False)
                bar.update()
    return begun


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
