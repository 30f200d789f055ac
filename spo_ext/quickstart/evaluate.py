"""Evaluation on held-out problems: pass@k, diversity, distance from the reference, entropy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import Qwen2ForCausalLM

from spo_ext.metrics import distinct_correct, mean_pass_at_k

from .judging import Grade
from .problems import Problem
from .rollouts import draw_and_grade, score
from .runlog import RunLog
from .session import Session
from .vocabulary import encode_prompt

SEED_OFFSET = 1_000_003


def evaluate(
    policy: Qwen2ForCausalLM,
    reference: Qwen2ForCausalLM,
    problems: Sequence[Problem],
    step: int,
    session: Session,
) -> None:
    """Draws evaluation_samples programs per problem and writes one line of metrics.

    pass_at_1 and pass_at_k are unbiased; distinct_correct is the mean number of different correct
    programs per solved problem; kl (over kl_problems) and entropy are nats per program.
    """
    config, log = session.config, session.log
    n = config.evaluation_samples
    with torch.random.fork_rng(devices=[]):
        # Evaluating more or less often must not change what the training draws.
        torch.manual_seed(config.seed + SEED_OFFSET)
        programs, grades, sums = draw_and_grade(policy, problems, n, session, "evaluation")
    by_problem = [grades[i : i + n] for i in range(0, len(grades), n)]
    correct = [sum(grade.correct for grade in row) for row in by_problem]
    distinct = [_distinct(row) for row in by_problem if any(grade.correct for grade in row)]
    with log.stage("evaluation: KL"):
        rows = min(config.kl_problems, len(problems)) * n
        prompts = [encode_prompt(problem) for problem in problems for _ in range(n)][:rows]
        ref_sums = score(reference, prompts, programs[:rows])
    values = {
        "pass_at_1": mean_pass_at_k(n, correct, 1),
        "pass_at_k": mean_pass_at_k(n, correct, config.evaluation_k),
        "distinct_correct": sum(distinct) / max(1, len(distinct)),
        "kl": float((sums[:rows] - ref_sums).mean()) if rows else 0.0,
        "entropy": -float(sums.mean()),
        "mean_tokens": sum(map(len, programs)) / len(programs),
    }
    log.write_metrics("evaluation", step, values)
    _write_samples(problems, by_problem, step, log)


def _distinct(grades: Sequence[Grade]) -> int:
    return distinct_correct([grade.source for grade in grades], [grade.correct for grade in grades])


def _write_samples(
    problems: Sequence[Problem], grades: Sequence[Sequence[Grade]], step: int, log: RunLog
) -> None:
    """Each different program once, the most frequent of a problem first."""
    for problem, row in zip(problems, grades, strict=True):
        for grade, count in Counter(row).most_common():
            log.write_sample(
                {
                    "step": step,
                    "prompt": problem.description,
                    "program": grade.source,
                    "passed": grade.passed,
                    "total": grade.total,
                    "count": count,
                }
            )
