"""The reward of a program: 1 if it passes every hidden test of its problem, and else 0.

`reward: spo_ext.contests.reward:passes` in a yaml names the function.

Many programs share a run of the sandbox, which costs more to start than they take. They may: a text
of the vocabulary names nothing that could reach another program. What one may do to others is to
use up their time and memory. A run that does not end well therefore says nothing, and its programs
run again, each alone.
"""

from __future__ import annotations

import ast
import functools
import json
import warnings
from collections.abc import Sequence

from spo_ext.contests.problems import Cases
from spo_ext.contests.vocabulary import decode_program
from spo_ext.sandbox import Program, Sandbox, Submission, agree, judge

_PROGRAMS_PER_RUN = 24

# Runs in the sandbox. A value goes out in a list, [] stands for none: an exception, or a value
# that could not leave the sandbox and would fail the whole run.
_RUN_ALL = """
def plain(value):
    if type(value) is list:
        return all(map(plain, value))
    return type(value) in (int, bool)

def answer(source, inputs):
    try:
        names = {}
        exec(source, names)
        function = names["f"]
    except MemoryError:
        raise
    except Exception:
        return [[] for _ in inputs]
    answers = []
    for x in inputs:
        try:
            value = function(list(x))
        except MemoryError:
            raise
        except Exception:
            answers.append([])
        else:
            answers.append([value] if plain(value) else [])
    return answers

def f(sources, inputs):
    return [answer(source, inputs[number]) for source, number in sources]
"""


def passes(
    completion_ids: Sequence[Sequence[int]], tests: Sequence[Cases], **_: object
) -> list[float]:
    """1.0 for each program that is right on all tests of its prompt: no credit for luck on some."""
    pairs = [(cases, source_of(ids)) for cases, ids in zip(tests, completion_ids, strict=True)]
    return [float(n == len(cases)) for n, (cases, _) in zip(_judge()(pairs), pairs, strict=True)]


def source_of(ids: Sequence[int]) -> str:
    """A program's Python source, "" if it has none."""
    return decode_program(ids) or ""


@functools.cache
def _judge() -> Judge:
    return Judge(Sandbox(workers=2))


class Judge:
    """Counts passed tests, of each different pair of tests and source once for its whole life."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._passed: dict[tuple[str, str], int] = {}

    def __call__(self, pairs: Sequence[tuple[Cases, str]]) -> list[int]:
        """How many of its tests each source passes. Raises SandboxError if the sandbox failed."""
        keys = [(json.dumps(cases), source) for cases, source in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._passed}
        runnable = {key: pair for key, pair in new.items() if is_python(pair[1])}
        self._passed.update(dict.fromkeys(new, 0))
        found = count_passed(self._sandbox, list(runnable.values()))
        self._passed.update(zip(runnable, found, strict=True))
        return [self._passed[key] for key in keys]


def is_python(source: str) -> bool:
    """Whether the text parses; a cheap filter that spares the sandbox most hopeless programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "5if" parses with a deprecation warning
        try:
            return bool(ast.parse(source).body)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False


def count_passed(sandbox: Sandbox, programs: Sequence[tuple[Cases, str]]) -> list[int]:
    """How many tests each source passes, 0 if it did anything else wrong.

    Raises SandboxError if the sandbox failed.
    """
    starts = range(0, len(programs), _PROGRAMS_PER_RUN)
    bundles = [programs[start : start + _PROGRAMS_PER_RUN] for start in starts]
    outcomes = sandbox.run([_bundle(bundle) for bundle in bundles])
    passed: list[int] = []
    for bundle, outcome in zip(bundles, outcomes, strict=True):
        if outcome.status == "ok" and isinstance(outcome.outputs[0], list):
            passed += map(_count, bundle, outcome.outputs[0])
        else:
            passed += _alone(sandbox, bundle)
    return passed


def _bundle(programs: Sequence[tuple[Cases, str]]) -> Program:
    numbers: dict[str, int] = {}
    inputs: list[list[list[int]]] = []
    sources = []
    for cases, source in programs:
        key = json.dumps(cases)
        if key not in numbers:
            numbers[key] = len(inputs)
            inputs.append([x for x, _ in cases])
        sources.append((source, numbers[key]))
    return Program(_RUN_ALL, "f", ((sources, inputs),))


def _count(program: tuple[Cases, str], answers: Sequence[Sequence[object]]) -> int:
    pairs = zip(answers, program[0], strict=True)
    return sum(agree(answer, [expected]) for answer, (_, expected) in pairs)


def _alone(sandbox: Sandbox, programs: Sequence[tuple[Cases, str]]) -> list[int]:
    submissions = [
        Submission(
            Program(source, "f", tuple((list(x),) for x, _ in cases)), tuple(y for _, y in cases)
        )
        for cases, source in programs
    ]
    # A program that passed every call and then misbehaved is not correct.
    return [
        0 if verdict.passed == verdict.total and not verdict.ok else verdict.passed
        for verdict in judge(sandbox, submissions)
    ]
