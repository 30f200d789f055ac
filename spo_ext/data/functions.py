"""Rows of MBPP (full, sanitized, plus) and HumanEval (plus too): one function, tests as source."""

from __future__ import annotations

from spo_ext.data.asserts import function_of
from spo_ext.data.records import Defaults, Record, Row, RowError, solution, strings, text
from spo_ext.data.records import optional_text as optional
from spo_ext.data.tests import check_tests
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
