"""Rows of one function: MBPP and HumanEval, tests as source; EvalPlus, inputs and a solution.

EvalPlus' expected outputs are what the canonical solution returns, so it stands in the check, where
a program cannot see it. Outputs are compared as EvalPlus does: equal, or else floats that differ by
at most `atol`, and for a few problems in a way of their own.
"""

from __future__ import annotations

import ast
import contextlib
from typing import Any

from spo_ext.data.records import (
    Defaults,
    Record,
    Row,
    RowError,
    optional_text,
    shown,
    solution,
    strings,
    text,
)
from spo_ext.data.records import optional_text as optional
from spo_ext.data.tests import check_tests, function_of, parse_source
from spo_ext.store.records import Prompt

# For all tests together: HumanEval's grader gives 3 s; a solution of MBPP's authors needs as much.
_HUMANEVAL, _MBPP = ({"cpu_seconds": seconds, "memory_mib": 1024} for seconds in (3, 6))


def parse_mbpp(row: Row, defaults: Defaults) -> Record:
    """The prompt ends with the first assert, which says the name and the form of arguments.

    Raises RowError.
    """
    question = text(row, "text" if row.get("text") is not None else "prompt")
    asserts = strings(row, "test_list")
    if not asserts:
        raise RowError("there are no tests")
    lines = [*strings(row, "test_imports"), optional(row, "test_setup_code")]
    prefix = "".join(line + "\n" for line in lines if line.strip())
    check = "\n".join([*asserts, *strings(row, "challenge_test_list"), optional(row, "test")])
    code = optional(row, "code")
    tests = check_tests(function_of(prefix + check, code), check, prefix, limits=_MBPP)
    content = f"{question}\nYour code should pass this test:\n{asserts[0]}\n"
    return record_of(row, content, tests, code, defaults, "mbpp")


def parse_humaneval(row: Row, defaults: Defaults) -> Record:
    """The completion continues the prompt, which is source. Raises RowError."""
    content = text(row, "prompt")
    if row.get("problem_description") is not None:
        raise RowError("prompt must be the problem, and problem_description is, as in LeetCode's")
    # For checks that take the function by its name, too.
    tests = check_tests(
        row.get("entry_point"), text(row, "test"), content, function=True, limits=_HUMANEVAL
    )
    source = optional(row, "canonical_solution")
    return record_of(row, content, tests, source, defaults, "humaneval")


def record_of(
    row: Row,
    content: str,
    tests: dict[str, object],
    source: str,
    defaults: Defaults,
    data_set: str,
) -> Record:
    """A prompt with these tests and, unless it is blank, a solution in source."""
    completions = []
    if source.strip():
        completions.append(solution(source, 1.0, defaults.origin_of(data_set)))
    prompt = Prompt(content, tests=tests, split=defaults.split_of(row))
    return Record(prompt, tuple(completions))


# EvalPlus gives every input a second or more, and up to a minute to all of them.
_LIMITS = {"cpu_seconds": 10, "memory_mib": 2048}
# Problems whose answers are one of several, by the name of the function.
_ORACLES = {
    "find_zero": "abs(poly(*given, output)) <= atol",
    "are_equivalent": "True",
    "sum_div": "output == wanted or output == 0",
    **dict.fromkeys(
        ("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly",
         "larg_nnum", "intersection_array", "find_dissimilar", "Diff"),
        "set(output) == set(wanted)",
    ),
    **dict.fromkeys(
        ("check_str", "text_match_three", "text_starta_endb"),
        "wanted == (output if isinstance(output, bool) else output is not None)",
    ),
    "surface_Area": "same(output, wanted, atol) or abs(output - round("
    "given[0] ** 2 + 2 * given[0] * math.hypot(given[0] / 2, given[1]))) <= atol",
    "digit_distance_nums": "output in (wanted, sum(abs(int(a) - int(b)) for a, b in "
    "itertools.zip_longest(*(str(x)[::-1] for x in given), fillvalue='0')))",
}  # fmt: skip

_CHECK = """
import copy, itertools, math
reference_names = {}
exec(REFERENCE, reference_names)
reference, poly = reference_names[ENTRY_POINT], reference_names.get("poly")

def floats(value):
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)

def close(output, wanted, atol):
    if isinstance(wanted, (list, tuple)):
        return len(output) == len(wanted) and all(
            close(a, b, atol) for a, b in zip(output, wanted)
        )
    if wanted != wanted or abs(wanted) == math.inf:
        return output == wanted
    return abs(output - wanted) <= atol + 1e-7 * abs(wanted)

def same(output, wanted, atol):
    if output == wanted:
        return True
    atol = atol or (1e-6 if floats(wanted) else 0)
    return bool(atol) and type(output) is type(wanted) and close(output, wanted, atol)

def check(candidate):
    for given in INPUTS:
        wanted = reference(*copy.deepcopy(given))
        output, atol = candidate(*given), ATOL
        assert ORACLE, f"wrong output for {given!r:.200}"
"""


def parse_evalplus(row: Row, defaults: Defaults) -> Record:
    """All inputs, base and plus; the prompt is source that a completion continues or repeats.

    Raises RowError.
    """
    content, name = text(row, "prompt"), text(row, "entry_point")
    source, atol = text(row, "canonical_solution"), row.get("atol") or 0
    if not isinstance(atol, int | float):
        raise RowError(f"atol must be a number, got {shown(atol)}")
    humaneval = f"def {name}(" in content
    prefix = content if humaneval else ""
    inputs = [item for column in ("base_input", "plus_input") for item in _inputs(row, column)]
    if not inputs:
        raise RowError("there are no tests")
    row.get("test")  # The same inputs and the solution's outputs as source.
    shapes = _shapes(optional_text(row, "assertion"), name)
    typed = [[*map(_shaped, item, shapes or item)] for item in inputs]
    values = {
        "REFERENCE": prefix + source,
        "ENTRY_POINT": name,
        "INPUTS": typed,
        "ATOL": atol,
    }
    lines = [f"{key} = {value!r}\n" for key, value in values.items()]
    oracle = _ORACLES.get(name, "same(output, wanted, atol)")
    check = "from math import inf, nan\n" + "".join(lines) + _CHECK.replace("ORACLE", oracle)
    data_set = "humaneval" if humaneval else "mbpp"
    tests = check_tests(name, check, prefix, function=True, limits=_LIMITS)
    return record_of(row, content, tests, source, defaults, data_set)


def _inputs(row: Row, column: str) -> list[list[Any]]:
    given = row.get(column) or []
    if not isinstance(given, list) or not all(isinstance(item, list) for item in given):
        raise RowError(f"{column} must be a list of lists of arguments, got {shown(given)}")
    return given


def _shapes(assertion: str, name: str) -> list[Any] | None:
    """Arguments of the longest call in the row's asserts: JSON has lists where they have tuples."""
    calls = []
    for node in ast.walk(parse_source(assertion)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            try:
                calls.append([ast.literal_eval(argument) for argument in node.args])
            except (ValueError, TypeError):
                continue  # It computes an argument.
    return max(calls, key=lambda call: len(repr(call)), default=None)


def _shaped(value: Any, shape: Any) -> Any:
    """The value with tuples, sets and complex numbers where the shape has some."""
    if isinstance(value, list) and isinstance(shape, list | tuple | set | frozenset) and shape:
        parts = list(shape)
        items = [
            _shaped(item, parts[min(place, len(parts) - 1)]) for place, item in enumerate(value)
        ]
        return type(shape)(items)
    if isinstance(value, dict) and isinstance(shape, dict) and shape:
        key_shape, item_shape = next(iter(shape.items()))
        number = isinstance(key_shape, int)
        return {(int(k) if number else k): _shaped(v, item_shape) for k, v in value.items()}
    if isinstance(value, str) and isinstance(shape, complex | float | int):
        with contextlib.suppress(ValueError):  # Not every input is of the same type.
            return complex(value) if isinstance(shape, complex) else float(value)
    return value
