"""Compares outputs with what was expected, in the trusted process, after the program has ended."""

from __future__ import annotations

from collections.abc import Sequence

from spo_ext.sandbox.records import Outcome, Raised, StdinProgram, Submission, Verdict
from spo_ext.sandbox.sandbox import Sandbox


def judge(sandbox: Sandbox, submissions: Sequence[Submission]) -> list[Verdict]:
    """Run all submissions and say which outputs are as expected, in the same order.

    Return values must agree in type as in value, at every depth: True is not 1, 1 is not 1.0; NaN
    agrees with NaN. Printed text is compared line by line without trailing white space. Raises
    SandboxError if the sandbox failed and TypeError if an expected output is not plain data.
    """
    expected = [_expected_keys(submission) for submission in submissions]
    outcomes = sandbox.run([submission.program for submission in submissions])
    return [_compare(*each) for each in zip(submissions, expected, outcomes, strict=True)]


def agree(output: object, expected: object) -> bool:
    """Whether two return values agree in type as in value, at every depth, as `judge` has it."""
    return _typed(output) == _typed(expected)


def _expected_keys(submission: Submission) -> list[object]:
    return [_key(submission, value) for value in submission.expected]


def _compare(submission: Submission, expected: list[object], outcome: Outcome) -> Verdict:
    complaints = []
    for index, (output, key) in enumerate(zip(outcome.outputs, expected, strict=True)):
        if isinstance(output, Raised):
            complaints.append(f"call {index}: {output.text}")
        elif _key(submission, output) != key:
            complaints.append(f"call {index}: wrong output")
    ok = not complaints and outcome.status == "ok"
    reason = outcome.reason or "".join(complaints[:1])
    return Verdict(len(expected) - len(complaints), len(expected), ok, reason)


def _key(submission: Submission, value: object) -> object:
    """What two outputs of this kind of program agree in, as built-in values with built-in `==`."""
    if not isinstance(submission.program, StdinProgram):
        return _typed(value)
    if not isinstance(value, str):
        raise TypeError(f"the expected output of a script must be str, got {type(value).__name__}")
    return [line.rstrip() for line in value.rstrip().split("\n")]


def _typed(value: object) -> object:
    """Pair every part of a value with its type."""
    kind = type(value)
    if isinstance(value, float) and value != value:
        return kind, "nan"
    if value is None or kind in (bool, int, float, str, bytes):
        return kind, value
    if isinstance(value, dict) and kind is dict:
        return kind, frozenset((_typed(k), _typed(v)) for k, v in value.items())
    if isinstance(value, list | tuple) and kind in (list, tuple):
        return kind, tuple(map(_typed, value))
    if isinstance(value, set | frozenset) and kind in (set, frozenset):
        return kind, frozenset(map(_typed, value))
    raise TypeError(f"an expected output must be plain data, got {kind.__name__}")
