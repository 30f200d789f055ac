"""What a policy is worth on problems that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import spo_ext
from spo_ext.contests.problems import Problem
from spo_ext.contests.vocabulary import encode_prompt
from spo_ext.metrics import distinct_correct, mean_pass_at_k

from .judging import Grade, Grader
from .policy import sample, score
from .settings import Config

_PROMPTS_PER_PASS = 40
_BINS = 5
_SEED = 1_000_003


def evaluate(
    policy: Qwen2ForCausalLM,
    origin: Qwen2ForCausalLM,
    reference: Qwen2ForCausalLM,
    problems: Sequence[Problem],
    grader: Grader,
    config: Config,
    seed: int,
    beta: float | None,
) -> dict[str, Any]:
    """Plain data: evaluation_samples programs per problem at temperature 1.

    pass_at: unbiased, for k = 1, 2, ... evaluation_samples. correct: of each problem.
    distinct_correct: mean number of different correct programs per solved problem. entropy, and kl
    to the policy that the run began with (origin) over kl_problems: nats per program. calibration:
    see `calibrate`, against the reference of the loss; None without a beta. torch's random state is
    left as it was.
    """
    n = config.evaluation_samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED + seed)
        programs, sums = _draw(policy, problems, config)
    grades = grader.grade([problem for problem in problems for _ in range(n)], programs)
    by_problem = [grades[i : i + n] for i in range(0, len(grades), n)]
    correct = [sum(grade.correct for grade in row) for row in by_problem]
    distinct = [_distinct(row) for row, count in zip(by_problem, correct, strict=True) if count]
    rows = min(config.kl_problems, len(problems)) * n
    prompts = [encode_prompt(problem) for problem in problems for _ in range(n)][:rows]
    log_ratios = sums[:rows] - score(origin, prompts, programs[:rows])
    kl = float(log_ratios.mean())
    if reference is not origin and beta is not None:
        log_ratios = sums[:rows] - score(reference, prompts, programs[:rows])
    rewards = torch.tensor([grade.reward for grade in grades[:rows]])
    return {
        "pass_at": [mean_pass_at_k(n, correct, k) for k in range(1, n + 1)],
        "correct": correct,
        "distinct_correct": sum(distinct) / max(1, len(distinct)),
        "entropy": -float(sums.mean()),
        "kl": kl,
        "mean_tokens": sum(map(len, programs)) / len(programs),
        "calibration": None
        if beta is None
        else calibrate(log_ratios.view(-1, n), rewards.view(-1, n), beta),
    }


def calibrate(log_ratios: Tensor, rewards: Tensor, beta: float) -> dict[str, Any]:
    """What Q_T says of the reward; both arguments [problems, samples], nats and rewards.

    Q_T = Q_0 + beta log-ratio, where Q_0 is estimated by the group's own samples.

    Returns:
        residual_rms: of Q_T - r. ranked: how often a correct program has the larger Q_T of two of
        its problem that differ in reward, None without such a pair. bins: mean Q_T and mean reward
        of equal shares of the programs, by Q_T.
    """
    q0 = spo_ext.prompt_value(rewards, beta=beta, estimator="group", log_ratios=log_ratios)
    terminal_q = q0[:, None] + beta * log_ratios
    residual = (terminal_q - rewards).double()
    better = rewards[:, :, None] > rewards[:, None, :]
    wins = (log_ratios[:, :, None] - log_ratios[:, None, :])[better].sign()
    order = terminal_q.flatten().argsort(stable=True)
    parts = [part for part in order.tensor_split(_BINS) if len(part)]
    return {
        "residual_rms": float(residual.square().mean().sqrt()),
        "ranked": float((wins + 1).mean() / 2) if len(wins) else None,
        "bins": [
            [float(terminal_q.flatten()[part].mean()), float(rewards.flatten()[part].mean())]
            for part in parts
        ],
    }


def _draw(
    policy: Qwen2ForCausalLM, problems: Sequence[Problem], config: Config
) -> tuple[list[list[int]], Tensor]:
    programs: list[list[int]] = []
    sums = []
    prompts = [encode_prompt(problem) for problem in problems]
    for start in range(0, len(prompts), _PROMPTS_PER_PASS):
        part = prompts[start : start + _PROMPTS_PER_PASS]
        drawn = sample(policy, part, config.evaluation_samples, config.max_program_tokens)
        programs += drawn.programs
        sums.append(drawn.logprob_sums)
    return programs, torch.cat(sums)


def _distinct(grades: Sequence[Grade]) -> int:
    return distinct_correct([grade.source for grade in grades], [grade.correct for grade in grades])
