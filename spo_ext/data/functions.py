"""Rows of MBPP (full, sanitized, plus) and HumanEval (plus too): one function, tests as asserts."""

from __future__ import annotations

from spo_ext.data.asserts import Cases, read_asserts, read_tables
from spo_ext.data.records import Defaults, Record, Row, RowError, solution, strings, text
from spo_ext.data.records import optional_text as optional
from spo_ext.data.tests import call_tests
from spo_ext.store.records import Prompt


def parse_mbpp(row: Row, defaults: Defaults) -> Record:
    """The prompt ends with the first assert, which says the name and the form of arguments.

    Raises RowError.
    """
    question = text(row, "text" if row.get("text") is not None else "prompt")
    asserts = strings(row, "test_list")
    if not asserts:
        raise RowError("there are no tests")
    cases = Cases()
    read_asserts("\n".join([*asserts, *strings(row, "challenge_test_list")]), cases)
    if optional(row, "test"):
        read_tables(optional(row, "test"), cases)
    lines = [*strings(row, "test_imports"), optional(row, "test_setup_code")]
    prefix = "".join(line + "\n" for line in lines if line.strip())
    content = f"{question}\nYour code should pass this test:\n{asserts[0]}\n"
    return _record(content, cases, prefix, optional(row, "code"), defaults, "mbpp")


def parse_humaneval(row: Row, defaults: Defaults) -> Record:
    """The completion continues the prompt, which is source. Raises RowError."""
    content, name = text(row, "prompt"), text(row, "entry_point")
    cases = Cases(name="candidate")
    if not read_tables(text(row, "test"), cases):
        read_asserts(text(row, "test"), cases)
    cases.name = name
    source = optional(row, "canonical_solution")
    return _record(content, cases, content, source, defaults, "humaneval")


def _record(
    content: str, cases: Cases, prefix: str, source: str, defaults: Defaults, data_set: str
) -> Record:
    if not cases.calls:
        raise RowError("no test is of the form f(literals) == literal; others cannot be judged")
    tests = call_tests(cases.name, cases.calls, cases.expected, prefix)
    completions = []
    if source.strip():
        completions.append(solution(source, 1.0, defaults.origin_of(data_set)))
    prompt = Prompt(content, tests=tests, split=defaults.split or "train")
    return Record(prompt, tuple(completions), cases.left_out)
