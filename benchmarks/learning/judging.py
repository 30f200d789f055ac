"""Programs of the harness, judged by the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spo_ext.contests.problems import Problem
from spo_ext.contests.reward import Judge, source_of
from spo_ext.sandbox import Sandbox


@dataclass(frozen=True, slots=True)
class Grade:
    """The source of one sampled program ("" if it has none) and how many tests it passed."""

    source: str
    passed: int
    total: int

    @property
    def correct(self) -> bool:
        """Whether the program solves its problem: every hidden test passed."""
        return self.passed == self.total

    @property
    def reward(self) -> float:
        """0 for a correct program, -1 for any other: no credit for a test passed by luck."""
        return 0.0 if self.correct else -1.0


class Grader:
    """Grades programs, each different (problem, source) pair once for the life of the object."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._judge = Judge(sandbox)

    def grade(self, problems: Sequence[Problem], programs: Sequence[Sequence[int]]) -> list[Grade]:
        """One grade per program; problems holds the problem of each. Raises SandboxError."""
        sources = [source_of(program) for program in programs]
        tests = [problem.tests for problem in problems]
        passed = self._judge(list(zip(tests, sources, strict=True)))
        return [
            Grade(source, count, len(cases))
            for source, count, cases in zip(sources, passed, tests, strict=True)
        ]
