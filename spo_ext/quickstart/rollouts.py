"""Trajectories: sampled programs with all that the loss needs to know about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

import spo_ext

from .judging import Grade
from .policy import hidden_states, make_batch, sample
from .problems import Problem
from .session import Session
from .vocabulary import encode_prompt

_ROWS_PER_PASS = 128
_PROMPTS_PER_PASS = 80


@dataclass(frozen=True, slots=True)
class Trajectories:
    """S programs, `per_prompt` for each problem in order; every tensor is [S], in nats or rewards.

    behaviour_logprobs and ref_logprobs are sums over a program's tokens.
    """

    prompts: list[list[int]]
    programs: list[list[int]]
    grades: list[Grade]
    groups: Tensor  # index of the problem
    rewards: Tensor
    behaviour_logprobs: Tensor
    ref_logprobs: Tensor

    def rows(self, start: int, stop: int) -> Trajectories:
        """A contiguous share, for one optimiser step."""
        cut = slice(start, stop)
        return Trajectories(
            self.prompts[cut],
            self.programs[cut],
            self.grades[cut],
            self.groups[cut],
            self.rewards[cut],
            self.behaviour_logprobs[cut],
            self.ref_logprobs[cut],
        )


def draw_and_grade(
    policy: Qwen2ForCausalLM,
    problems: Sequence[Problem],
    per_prompt: int,
    session: Session,
    stage: str,
) -> tuple[list[list[int]], list[Grade], Tensor]:
    """Programs, their grades and their log-probability sums under the policy that drew them."""
    programs: list[list[int]] = []
    logprob_sums = []
    prompts = [encode_prompt(problem) for problem in problems]
    with session.log.stage(f"{stage}: sampling"):
        for start in range(0, len(prompts), _PROMPTS_PER_PASS):
            part = prompts[start : start + _PROMPTS_PER_PASS]
            drawn = sample(policy, part, per_prompt, session.config.max_program_tokens)
            programs += drawn.programs
            logprob_sums.append(drawn.logprob_sums)
    with session.log.stage(f"{stage}: judging"):
        repeated = [problem for problem in problems for _ in range(per_prompt)]
        grades = session.grader.grade(repeated, programs)
    return programs, grades, torch.cat(logprob_sums)


def collect(
    policy: Qwen2ForCausalLM,
    reference: Qwen2ForCausalLM,
    problems: Sequence[Problem],
    session: Session,
) -> Trajectories:
    """One round of rollouts of the policy as it is now, scored once by the reference."""
    per_prompt = session.config.programs_per_prompt
    programs, grades, sums = draw_and_grade(policy, problems, per_prompt, session, "SPO")
    prompts = [encode_prompt(problem) for problem in problems for _ in range(per_prompt)]
    with session.log.stage("SPO: reference log-probs"):
        ref_logprobs = score(reference, prompts, programs)
    return Trajectories(
        prompts,
        programs,
        grades,
        groups=torch.arange(len(problems)).repeat_interleave(per_prompt),
        rewards=torch.tensor([grade.reward for grade in grades]),
        behaviour_logprobs=sums,
        ref_logprobs=ref_logprobs,
    )


@torch.no_grad()
def score(
    policy: Qwen2ForCausalLM, prompts: Sequence[list[int]], programs: Sequence[list[int]]
) -> Tensor:
    """Log-probability of each program, summed over its tokens: float32 [S], nats."""
    # Rows of similar length share a pass, which halves the padding.
    order = sorted(range(len(programs)), key=lambda i: len(prompts[i]) + len(programs[i]))
    sums = torch.empty(len(programs))
    for start in range(0, len(order), _ROWS_PER_PASS):
        rows = order[start : start + _ROWS_PER_PASS]
        batch = make_batch([prompts[i] for i in rows], [programs[i] for i in rows])
        hidden = hidden_states(policy, batch)
        logprobs = spo_ext.token_logprobs(hidden, policy.lm_head.weight, batch.targets)
        sums[rows] = logprobs.sum(dim=1)
    return sums
