"""What tests written as source ask for: which names of the program, which packages."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.util
import sys
from collections.abc import Iterator

from spo_ext.data.records import RowError
from spo_ext.sandbox.prelude import make_prelude


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
