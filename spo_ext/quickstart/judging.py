"""Rewards: runs sampled programs on the hidden tests of their problem, in the sandbox."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from spo_ext.sandbox import Sandbox

from .bundles import count_passed
from .problems import Problem
from .vocabulary import decode_program


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
        self._sandbox = sandbox
        self._passed: dict[tuple[Problem, str], int] = {}
        self.executed = 0

    def grade(self, problems: Sequence[Problem], programs: Sequence[Sequence[int]]) -> list[Grade]:
        """One grade per program; problems holds the problem of each. Raises SandboxError."""
        pairs = [
            (problem, decode_program(program) or "")
            for problem, program in zip(problems, programs, strict=True)
        ]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._passed]
        runnable = [pair for pair in new if is_python(pair[1])]
        self._passed.update(dict.fromkeys(new, 0))
        self._passed.update(zip(runnable, count_passed(self._sandbox, runnable), strict=True))
        self.executed += len(runnable)
        return [
            Grade(source, self._passed[problem, source], len(problem.tests))
            for problem, source in pairs
        ]


def is_python(source: str) -> bool:
    """Whether the text parses; a cheap filter that spares the sandbox most hopeless programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "5if" parses with a deprecation warning
        try:
            return bool(ast.parse(source).body)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False
