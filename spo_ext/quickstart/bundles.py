"""Many sampled programs in one run of the sandbox, which costs more to start than they take.

They share a process, and may: a text of the vocabulary names nothing that could reach another
program. What one may do to others is to use up their time and memory. A run that does not end well
therefore says nothing, and its programs run again, each alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spo_ext.sandbox import Program, Sandbox, Submission, agree, judge

from .problems import Problem

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


def count_passed(sandbox: Sandbox, programs: Sequence[tuple[Problem, str]]) -> list[int]:
    """How many tests of its problem each source passes, 0 if it did anything else wrong.

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


def _bundle(programs: Sequence[tuple[Problem, str]]) -> Program:
    numbers: dict[Problem, int] = {}
    sources = [(source, numbers.setdefault(problem, len(numbers))) for problem, source in programs]
    inputs = [[inputs for inputs, _ in problem.tests] for problem in numbers]
    return Program(_RUN_ALL, "f", ((sources, inputs),))


def _count(program: tuple[Problem, str], answers: Sequence[Sequence[object]]) -> int:
    problem, _ = program
    pairs = zip(answers, problem.tests, strict=True)
    return sum(agree(answer, [expected]) for answer, (_, expected) in pairs)


def _alone(sandbox: Sandbox, programs: Sequence[tuple[Problem, str]]) -> Iterator[int]:
    verdicts = judge(sandbox, [_submission(*program) for program in programs])
    for verdict in verdicts:
        # A program that passed every call and then misbehaved is not correct.
        failed_otherwise = verdict.passed == verdict.total and not verdict.ok
        yield 0 if failed_otherwise else verdict.passed


def _submission(problem: Problem, source: str) -> Submission:
    calls = tuple((list(inputs),) for inputs, _ in problem.tests)
    return Submission(Program(source, "f", calls), tuple(output for _, output in problem.tests))
