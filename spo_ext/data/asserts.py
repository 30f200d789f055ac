"""Assert statements as calls and expected results.

A program must not see what is expected of it, so an assert is not run beside it: `assert f(1) == 2`
becomes the call f(1) and the result 2, compared outside. Asserts of another form (a tolerance,
a loop, a set of the result) are counted as left out.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from spo_ext.data.records import RowError
from spo_ext.data.tests import plain

_PLAIN_CALL = re.compile(r"assertion\(\w+\(\*inp\), exp, [\w.+-]+\)")


@dataclass
class Cases:
    """calls and their results, of the function `name`."""

    name: str | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    expected: list[Any] = field(default_factory=list)
    left_out: int = 0

    def add(self, arguments: Any, expected: Any) -> None:
        """Raises RowError if either is not plain data."""
        plain(list(arguments))
        plain(expected)
        self.calls.append(tuple(arguments))
        self.expected.append(expected)


def read_asserts(source: str, cases: Cases) -> None:
    """Adds what the asserts in the source say; the first names the function if none is named.

    Raises RowError if the source does not parse.
    """
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            try:
                name, arguments, expected = _equation(node.test)
                if cases.name not in (None, name):
                    raise RowError("another function")
                cases.add(arguments, expected)
                cases.name = name
            except RowError:
                cases.left_out += 1


def read_tables(source: str, cases: Cases) -> bool:
    """Adds the lists `inputs` and `results` of the plus data sets; False if there are none.

    They are compared within a tolerance where results are floats; those are left out, because the
    sandbox compares exactly. So are all where the source compares in a way of its own, as sets say.
    Raises RowError if the source does not parse.
    """
    tree = _parse(source)
    tables = {
        target.id: node.value.elts
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if "inputs" not in tables or len(tables["inputs"]) != len(tables.get("results", ())):
        return False
    if not _compares_plainly(tree):
        cases.left_out += len(tables["inputs"])
        return True
    for arguments, result in zip(tables["inputs"], tables["results"], strict=True):
        try:
            values, expected = _literal(arguments), _literal(result)
            if not isinstance(values, list | tuple) or _has_float(expected):
                raise RowError("not comparable")
            cases.add(values, expected)
        except RowError:
            cases.left_out += 1
    return True


def _compares_plainly(tree: ast.Module) -> bool:
    """Each result goes as it is to `assertion(out, exp, atol)`, which begins with `out == exp`."""
    calls, heads, assigned = [], [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "assertion":
            calls.append(ast.unparse(node))
        elif isinstance(node, ast.FunctionDef) and node.name == "assertion":
            heads.append(ast.unparse(node.body[0]))
            stores = (x for x in ast.walk(node) if isinstance(x, ast.Name))
            assigned += [x.id for x in stores if isinstance(x.ctx, ast.Store)]
    return (
        len(heads) == 1
        and heads[0] in ("exact_match = out == exp", "assert out == exp")
        and assigned.count("exact_match") <= 1
        and not {"out", "exp"} & set(assigned)
        and bool(calls)
        and all(_PLAIN_CALL.fullmatch(call) for call in calls)
    )


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RowError(f"the tests are no Python that can be read: {error}") from None


def _equation(test: ast.expr) -> tuple[str, list[Any], Any]:
    """f(literals) == literal, or `is` with one of None, True, False."""
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        raise RowError("no comparison")
    call, [expected] = test.left, test.comparators
    if not isinstance(test.ops[0], ast.Eq | ast.Is):
        raise RowError("no equality")
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise RowError("no call")
    return call.func.id, [_literal(argument) for argument in call.args], _literal(expected)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise RowError("no literal") from None


def _has_float(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_float, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_has_float, value))
    return isinstance(value, float)
