"""Tests of a prompt as JSON in the store, and as the sandbox judges them.

    {"kind": "stdin", "inputs": ["1 2\n"], "expected": ["3\n"]}
    {"kind": "calls", "entry_point": "f", "calls": [["list", 1, 2]], "expected": [3], "prefix": ""}

Arguments and results of calls are written as `spo_ext.sandbox.codec` encodes them, which keeps a
tuple apart from a list. `prefix` is source that stands before the completion.
"""

from __future__ import annotations

import ast
import keyword
from collections.abc import Sequence
from typing import Any

from spo_ext.data.records import RowError, shown
from spo_ext.sandbox.codec import decode, encode
from spo_ext.sandbox.records import Program, StdinProgram, Submission
from spo_ext.store.codec import encode_json


def stdin_tests(inputs: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    """Raises RowError."""
    _check_sizes(inputs, expected)
    for value in (*inputs, *expected):
        if not isinstance(value, str):
            raise RowError(f"an input or output of a script must be text, got {shown(value)}")
    return {"kind": "stdin", "inputs": list(inputs), "expected": list(expected)}


def call_tests(
    entry_point: object, calls: Sequence[Any], expected: Sequence[Any], prefix: str = ""
) -> dict[str, Any]:
    """calls hold plain values, one list or tuple of arguments each. Raises RowError."""
    _check_sizes(calls, expected)
    if not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise RowError(f"the function to call must be a name, got {shown(entry_point)}")
    if keyword.iskeyword(entry_point):
        raise RowError(f"the function to call must be a name, got {shown(entry_point)}")
    for arguments in calls:
        if not isinstance(arguments, list | tuple):
            raise RowError(f"the arguments of a call must be a list, got {shown(arguments)}")
    return {
        "kind": "calls",
        "entry_point": entry_point,
        "calls": [plain(list(arguments)) for arguments in calls],
        "expected": [plain(value) for value in expected],
        "prefix": prefix,
    }


def plain(value: object) -> Any:
    """The value encoded. Raises RowError for what neither sandbox nor store can hold."""
    try:
        data = encode(value)
        encode_json(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"arguments and results must be plain finite data: {error}") from None
    return data


def submission(tests: Any, completion: str) -> Submission:
    """A completion and the stored tests of its prompt, for `spo_ext.sandbox.judge`.

    Raises ValueError if tests are not of the form above.
    """
    try:
        expected = tuple(tests["expected"])
        if tests["kind"] == "stdin":
            return Submission(StdinProgram(completion, tuple(tests["inputs"])), expected)
        if tests["kind"] != "calls":
            raise ValueError(f"kind must be stdin or calls, got {shown(tests['kind'])}")
        name = tests["entry_point"]
        calls = tuple(tuple(decode(arguments)) for arguments in tests["calls"])
        source = _with_method(tests["prefix"] + completion, name)
        return Submission(Program(source, name, calls), tuple(map(decode, expected)))
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"submission: tests have an unknown form: {error!r}") from None


def _with_method(source: str, name: str) -> str:
    """Makes a method of the class Solution, as some contests ask for it, callable by its name."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source  # the sandbox says what is wrong with it
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if name in names or "Solution" not in names:
        return source
    return f"{source}\n\n{name} = Solution().{name}\n"


def _check_sizes(runs: Sequence[Any], expected: Sequence[Any]) -> None:
    if not runs:
        raise RowError("there are no tests")
    if len(runs) != len(expected):
        raise RowError(f"there are {len(runs)} inputs and {len(expected)} outputs")
