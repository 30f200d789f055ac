"""The whole experiment: problems, reference policy, SPO, evaluations, report."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from spo_ext.sandbox import Sandbox

from .config import QuickstartConfig, Split
from .evaluate import evaluate
from .judging import Grader
from .problems import Problem, draw_problems
from .report import final_table, write_report
from .runlog import RunLog
from .session import Session
from .supervised import train_reference
from .train import improve


def run_experiment(config: QuickstartConfig, out: Path, quiet: bool) -> dict[str, float]:
    """Runs it, writes all files into `out` and returns the last evaluation.

    Raises SandboxError where programs cannot be isolated and OSError if `out` is not writable.
    """
    with (
        _torch_state(config),
        Sandbox(workers=config.sandbox_workers) as sandbox,
        RunLog(out) as log,
    ):
        log.write_metrics("settings", 0, {**asdict(config), "sandbox": sandbox.level})
        _train_and_evaluate(Session(config, Grader(sandbox), log, quiet))
        stages = {name: round(spent, 3) for name, spent in log.stage_seconds.items()}
        log.write_metrics("stage_seconds", config.steps, stages)
        write_report(config, sandbox.describe(), log, out)
    if not quiet:
        print(final_table(config, log))
    return {k: v for k, v in log.of_kind("evaluation")[-1].items() if isinstance(v, float)}


def _train_and_evaluate(session: Session) -> None:
    config = session.config
    # One generator per purpose: more problems, say, must not change the demonstrations.
    problems = _problems(config, "train", config.train_problems)
    held_out = _problems(config, config.evaluation_split, config.evaluation_problems)
    with session.log.stage("supervised training"):
        policy = train_reference(session, _generator(config, "demonstrations"))
    reference = copy.deepcopy(policy).requires_grad_(False)

    def evaluate_at(step: int) -> None:
        if step % config.evaluate_every == 0 or step == config.steps:
            evaluate(policy, reference, held_out, step, session)

    evaluate_at(0)
    batches = _generator(config, "batches")
    improve(policy, reference, problems, session, batches, after_step=evaluate_at)


def _problems(config: QuickstartConfig, split: Split, count: int) -> list[Problem]:
    return draw_problems(
        _generator(config, split),
        split,
        count,
        vague_probability=config.vague_probability,
        hidden_tests=config.hidden_tests,
        operations=(config.least_operations, config.most_operations),
    )


def _generator(config: QuickstartConfig, purpose: str) -> random.Random:
    return random.Random(f"{config.seed} {purpose}")


@contextmanager
def _torch_state(config: QuickstartConfig) -> Iterator[None]:
    """Seeds torch and sets its threads; the caller finds both as they were."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            yield
    finally:
        torch.set_num_threads(threads)
