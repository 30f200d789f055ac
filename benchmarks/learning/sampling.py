"""Programs that a policy writes, judged; from the prompt on or from the start of a solution."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Qwen2ForCausalLM

from spo_ext.contests.problems import Problem
from spo_ext.contests.vocabulary import EOS, encode_prompt

from .clock import Clock
from .distinct import sample_distinct
from .judging import Grader
from .policy import Samples, sample
from .settings import Config

_PROMPTS_PER_PASS = 80


@dataclass(frozen=True, slots=True)
class Sampled:
    """A program for problems[problem] with its reward.

    logprobs: of each token under the policy that wrote it, nats; 0 where it was given. version:
    numbers the draw, later ones higher.
    """

    problem: int
    program: tuple[int, ...]
    logprobs: tuple[float, ...]
    reward: float
    version: int

    @property
    def finished(self) -> bool:
        return self.program[-1] == EOS


@dataclass(frozen=True)
class Writer:
    """Samples for training problems.

    solutions: offline programs of each, for guidance. distinct: without replacement, except for
    guided ones.
    """

    problems: Sequence[Problem]
    solutions: Sequence[Sequence[Sequence[int]]]
    grader: Grader
    config: Config
    clock: Clock
    rng: random.Random
    temperature: float = 1.0
    distinct: bool = False

    def write(
        self, policy: Qwen2ForCausalLM, drawn: Sequence[int], free: int, guided: int, version: int
    ) -> list[Sampled]:
        """free + guided programs for each problem of drawn, one problem after the other.

        The first draw of each problem gets the version, the next one version + 1 and so on: a
        store then keeps equal programs apart, which it would count as one.
        """
        with self.clock.stage("sampling"):
            prompts = [encode_prompt(self.problems[i]) for i in drawn]
            rows = _unpack(self._sample(policy, prompts, free)) if free else []
            begun = self._guide(policy, drawn, prompts, guided) if guided else []
        per_problem = [
            rows[n * free : (n + 1) * free] + begun[n * guided : (n + 1) * guided]
            for n in range(len(drawn))
        ]
        with self.clock.stage("judging"):
            asked = [self.problems[i] for i in drawn for _ in range(free + guided)]
            programs = [program for group in per_problem for program, _ in group]
            rewards = iter([grade.reward for grade in self.grader.grade(asked, programs)])
        self.clock.sampled += len(programs)
        return [
            Sampled(problem, tuple(program), tuple(logprobs), next(rewards), version + n)
            for problem, group in zip(drawn, per_problem, strict=True)
            for n, (program, logprobs) in enumerate(group)
        ]

    def _guide(
        self,
        policy: Qwen2ForCausalLM,
        drawn: Sequence[int],
        prompts: Sequence[Sequence[int]],
        guided: int,
    ) -> list[tuple[list[int], list[float]]]:
        begun, begins = [], []
        for index, prompt in zip(drawn, prompts, strict=True):
            for _ in range(guided):
                begins.append(self._beginning(self.solutions[index]))
                begun.append([*prompt, *begins[-1]])
        ends = _unpack(self._sample(policy, begun, 1))
        most = self.config.max_program_tokens
        return [
            ((begin + program)[:most], ([0.0] * len(begin) + logprobs)[:most])
            for begin, (program, logprobs) in zip(begins, ends, strict=True)
        ]

    def _beginning(self, solutions: Sequence[Sequence[int]]) -> list[int]:
        """Nothing for a problem without a known solution."""
        if not solutions:
            return []
        solution = self.rng.choice(solutions)
        return list(solution[: self.rng.randrange(1, len(solution))])

    def _sample(
        self, policy: Qwen2ForCausalLM, prompts: Sequence[Sequence[int]], per_prompt: int
    ) -> list[Samples]:
        draw = sample_distinct if self.distinct and per_prompt > 1 else sample
        return [
            draw(
                policy,
                prompts[start : start + _PROMPTS_PER_PASS],
                per_prompt,
                self.config.max_program_tokens,
                self.temperature,
            )
            for start in range(0, len(prompts), _PROMPTS_PER_PASS)
        ]


def sample_rewards(policy: Qwen2ForCausalLM, writer: Writer, per_problem: int) -> torch.Tensor:
    """Rewards [problems, per_problem] of the policy on all problems of the writer."""
    every = range(len(writer.problems))
    rows = writer.write(policy, every, per_problem, 0, 0)
    return torch.tensor([row.reward for row in rows]).view(len(every), per_problem)


def _unpack(parts: Sequence[Samples]) -> list[tuple[list[int], list[float]]]:
    return [
        (program, logprobs[: len(program)])
        for part in parts
        for program, logprobs in zip(part.programs, part.logprobs.tolist(), strict=True)
    ]
