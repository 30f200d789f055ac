"""Tests of a prompt as JSON in the store, and as the sandbox judges them.

    {"kind": "stdin", "inputs": ["1 2\n"], "expected": ["3\n"]}
    {"kind": "calls", "entry_point": "f", "calls": [["list", 1, 2]], "expected": [3], "prefix": ""}
    {"kind": "check", "entry_point": "f", "check": "assert f(1, 2) == 3", "prefix": ""}

Arguments and results of calls are written as `spo_ext.sandbox.codec` encodes them, which keeps a
tuple apart from a list. `prefix` is source that stands before the completion; a check sees it too.
Each may have `relation`, `wrapped`, `limits` (fields of Limits) and `function`, as a Submission and
its Check have them, and `packages` that the tests import.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.util
import keyword
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from spo_ext.data.records import RowError, shown
from spo_ext.sandbox.codec import decode, encode
from spo_ext.sandbox.prelude import make_prelude
from spo_ext.sandbox.records import Check, Limits, Program, Relation, StdinProgram, Submission
from spo_ext.store.codec import encode_json


def function_of(tests: str, code: str) -> str:
    """The one function of the program that the tests call; `code` is a solution, if there is one.

    It may have the name of a built-in function. Raises RowError if the tests do not parse, or use
    anything else that neither they, nor Python, nor the prelude defines.
    """
    bound, used, called = _names(parse_source(tests))
    defined = _names(parse_source(code))[0] if code.strip() else set()
    known = {*dir(builtins), *make_prelude(), "__name__"} | bound
    names = [name for name in called if name in defined - bound]
    names = names or [name for name in used if name not in known]
    names = names or [name for name in called if name not in bound]
    others = [name for name in used if name not in known | {*names[:1]}]
    if not names or others:
        raise RowError(
            "the tests must call one function of the program and use nothing else of it, "
            f"got {', '.join([*names[:1], *others]) or 'none'}"
        )
    return names[0]


def _names(tree: ast.Module) -> tuple[set[str], dict[str, None], dict[str, None]]:
    """Names that the source defines, those that it uses, and of them those that it calls."""
    bound: set[str] = set()
    used: dict[str, None] = {}
    called: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called[node.func.id] = None
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used[node.id] = None
            else:
                bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return bound, used, called


def packages_of(source: str) -> list[str]:
    """Packages beyond Python's own library that the source imports.

    Raises RowError if it does not parse, or one is not installed here.
    """
    names: dict[str, None] = {}
    for node in ast.walk(parse_source(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0]: None for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names[node.module.partition(".")[0]] = None
    found = [name for name in names if name not in sys.stdlib_module_names]
    for name in found:
        if importlib.util.find_spec(name) is None:
            raise RowError(f"the tests import {name}, which is not installed")
    return found


def mentions(source: str, name: str) -> bool:
    """Whether the source defines or uses this name, or `candidate`. Raises RowError."""
    bound, used, _ = _names(parse_source(source))
    return name in bound or name in used or "candidate" in used


def parse_source(source: str) -> ast.Module:
    """The tree of tests, or of a prompt that is source. Raises RowError if it does not parse."""
    try:
        with long_integers():
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RowError(f"the tests are no Python that can be read: {error}") from None


@contextlib.contextmanager
def long_integers() -> Iterator[None]:
    """Reads integers of any length, of which Python refuses those of more than 4300 digits."""
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(digits)


_OPTIONS = {
    "stdin": {"inputs", "expected"},
    "calls": {"entry_point", "calls", "expected", "prefix", "wrapped"},
    "check": {"entry_point", "check", "prefix", "function"},
}
_OF_ALL = {"kind", "relation", "limits", "packages"}


def stdin_tests(
    inputs: Sequence[str],
    expected: Sequence[str],
    *,
    relation: Relation | None = None,
    limits: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Raises RowError."""
    _check_sizes(inputs, expected)
    for value in (*inputs, *expected):
        if not isinstance(value, str):
            raise RowError(f"an input or output of a script must be text, got {shown(value)}")
    tests = {"kind": "stdin", "inputs": list(inputs), "expected": list(expected)}
    return _checked(tests | _given(relation=relation, limits=limits))


def call_tests(
    entry_point: object,
    calls: Sequence[Any],
    expected: Sequence[Any],
    prefix: str = "",
    *,
    relation: Relation | None = None,
    wrapped: bool = False,
    limits: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """calls hold plain values, one list or tuple of arguments each. Raises RowError."""
    _check_sizes(calls, expected)
    for arguments in calls:
        if not isinstance(arguments, list | tuple):
            raise RowError(f"the arguments of a call must be a list, got {shown(arguments)}")
    tests = {
        "kind": "calls",
        "entry_point": entry_point,
        "calls": [_plain(list(arguments)) for arguments in calls],
        "expected": [_plain(value) for value in expected],
        "prefix": prefix,
    }
    return _checked(tests | _given(relation=relation, wrapped=wrapped, limits=limits))


def check_tests(
    entry_point: object,
    check: str,
    prefix: str = "",
    *,
    function: bool = False,
    limits: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Tests as source that calls the entry point. Raises RowError."""
    packages = packages_of(check)
    tests = {"kind": "check", "entry_point": entry_point, "check": check, "prefix": prefix}
    return _checked(tests | _given(function=function, packages=packages, limits=limits))


def check_form(tests: object) -> None:
    """Raises RowError, which says why, if no completion could be judged by these tests."""
    try:
        _checked(tests)
    except RowError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise RowError(f"tests have an unknown form: {error}") from None


def check_given(tests: object) -> None:
    """`check_form`, and whether lists are lists, source is Python that tests something, and the
    packages that it needs are here. Raises RowError.
    """
    check_form(tests)
    assert isinstance(tests, dict)
    for name in ("inputs", "expected", "calls", "packages"):
        if not isinstance(tests.get(name, []), list):
            raise RowError(f"{name} of tests must be a list, got {shown(tests[name])}")
    for package in tests.get("packages", []):
        packages_of(f"import {package}")
    if tests["kind"] == "check":
        source, name = tests["check"], "check" if tests.get("function") else tests["entry_point"]
        packages_of(source)
        if not mentions(source, name):
            raise RowError(f"the tests must {'define' if name == 'check' else 'call'} {name}")


def submission(tests: Any, completion: str, limits: Limits | None = None) -> Submission:
    """A completion and the stored tests of its prompt, for `spo_ext.sandbox.judge`.

    Args:
        limits: at least these; None: those of the tests, else the defaults.

    Raises ValueError if tests are not of the form above.
    """
    try:
        return _submission(tests, completion, _limits(tests.get("limits") or {}, limits))
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"submission: tests have an unknown form: {error!r}") from None


def _submission(tests: Any, completion: str, limits: Limits) -> Submission:
    kind = tests["kind"]
    if kind not in _OPTIONS:
        raise ValueError(f"kind must be one of {', '.join(_OPTIONS)}, got {shown(kind)}")
    unknown = set(tests) - _OPTIONS[kind] - _OF_ALL
    if unknown:
        raise ValueError(f"tests have an unknown form: {', '.join(sorted(unknown))}")
    if kind == "stdin":
        script = StdinProgram(completion, tuple(tests["inputs"]))
        return Submission(
            script, tuple(tests["expected"]), relation=tests.get("relation"), limits=limits
        )
    name, source = tests["entry_point"], tests["prefix"] + completion
    if kind == "check":
        check = Check(tests["check"], tests["prefix"], bool(tests.get("function")))
        return Submission(Program(source, name), check=check, limits=limits)
    calls = tuple(tuple(decode(arguments)) for arguments in tests["calls"])
    return Submission(
        Program(source, name, calls),
        tuple(map(decode, tests["expected"])),
        relation=tests.get("relation"),
        wrapped=bool(tests.get("wrapped")),
        limits=limits,
    )


def _limits(own: Mapping[str, float], least: Limits | None) -> Limits:
    if least is not None:
        own = {name: max(value, getattr(least, name)) for name, value in own.items()}
    fields: dict[str, Any] = dict(own)
    return replace(least or Limits(), **fields)


def packages_of_tests(tests: Any) -> Sequence[str]:
    """Packages that the tests themselves import."""
    return tests.get("packages", ())  # type: ignore[no-any-return]


def _checked(tests: Any) -> dict[str, Any]:
    """The tests, which can judge. Raises RowError, or what `submission` raises."""
    if not isinstance(tests, dict):
        raise RowError(f"tests must be an object with a kind, got {shown(tests)}")
    found = submission(tests, "")
    program = found.program
    if isinstance(program, StdinProgram):
        texts = (*program.inputs, *found.expected)
    else:
        name = program.entry_point
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise RowError(f"the function to call must be a name, got {shown(name)}")
        texts = (program.source, *((found.check.source,) if found.check else ()))
    for text in texts:
        if not isinstance(text, str):
            raise RowError(f"an input or output of a script must be text, got {shown(text)}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(f"a test must be text of UTF-8, got {shown(text)}") from None
    return tests


def _plain(value: object) -> Any:
    """The value encoded. Raises RowError for what neither sandbox nor store can hold."""
    try:
        data = encode(value)
        encode_json(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"arguments and results must be plain finite data: {error}") from None
    return data


def _given(**options: Any) -> dict[str, Any]:
    """Options that say something; tests that say no more keep the form they had before."""
    return {name: value for name, value in options.items() if value}


def _check_sizes(runs: Sequence[Any], expected: Sequence[Any]) -> None:
    if not runs:
        raise RowError("there are no tests")
    if len(runs) != len(expected):
        raise RowError(f"there are {len(runs)} inputs and {len(expected)} outputs")
