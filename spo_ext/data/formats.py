"""Which parser reads a row, by the columns it has, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from spo_ext.data.agents import parse_atif, parse_verifiers
from spo_ext.data.answers import parse_gsm8k, parse_math, parse_verl
from spo_ext.data.contests import (
    parse_apps,
    parse_code_contests,
    parse_livecodebench,
    parse_taco,
)
from spo_ext.data.functions import parse_evalplus, parse_humaneval, parse_mbpp
from spo_ext.data.records import Defaults, Fields, Record, Row, RowError
from spo_ext.data.trl import MASKS, parse_trl
from spo_ext.store.records import RESERVED

Parser = Callable[[Row, Defaults], Record]


def _either(of_evalplus: Parser, of_source: Parser) -> Parser:
    """Of rows with inputs, as EvalPlus publishes them, or tests as source, as on the hub."""

    def parse(row: Row, defaults: Defaults) -> Record:
        inputs = row.get("base_input") is not None
        return (of_evalplus if inputs else of_source)(row, defaults)

    return parse


PARSERS: dict[str, Parser] = {
    "trl": parse_trl,
    "verl": parse_verl,
    "gsm8k": parse_gsm8k,
    "math": parse_math,
    "code_contests": parse_code_contests,
    "taco": parse_taco,
    "apps": parse_apps,
    "mbpp": parse_mbpp,
    "evalplus": parse_evalplus,
    "mbppplus": _either(parse_evalplus, parse_mbpp),
    "humaneval": parse_humaneval,
    "humanevalplus": _either(parse_evalplus, parse_humaneval),
    "livecodebench": parse_livecodebench,
    "verifiers": parse_verifiers,
    "atif": parse_atif,
}

# The first whose columns are all there; any may have others.
_SIGNS = (
    ("trl", {"spo"}),
    ("verifiers", {"task", "agent", "nodes"}),
    ("atif", {"schema_version", "agent", "steps"}),
    ("code_contests", {"description", "public_tests"}),
    ("livecodebench", {"question_content", "public_test_cases"}),
    ("apps", {"question", "input_output", "problem_id"}),
    ("taco", {"question", "input_output"}),
    ("mbpp", {"test_list"}),
    ("humanevalplus", {"prompt", "entry_point", "canonical_solution", "base_input"}),
    ("humaneval", {"prompt", "entry_point", "test"}),
    ("verl", {"prompt", "reward_model"}),
    ("trl", {"prompt"}),
    ("gsm8k", {"question", "answer"}),
    ("math", {"problem", "solution"}),
    ("math", {"problem", "answer"}),
    ("trl", {"messages"}),
    ("trl", {"chosen", "rejected"}),
)
_PROGRAMS = set(
    "starter_code entry_point canonical_solution test_cases input_output public_tests "
    "private_tests public_test_cases private_test_cases base_input plus_input unit_tests".split()
)
_UNSEEN = "the prompt is stored as text alone, and the policy would not see it"
_UNSTORED = dict.fromkeys("image images video videos audio audios".split(), _UNSEEN)
_OF_TURNS = (*MASKS, "tools", "chat_template_kwargs", "turn_rewards")


def parse_row(row: Mapping[str, Any], format_name: str, defaults: Defaults) -> Record:
    """Columns that the format does not use are kept with the prompt.

    Raises RowError, or ValueError of the records, for a row that says nothing usable, and for a
    column that would have to be dropped.
    """
    fields, without = Fields(row), set(defaults.without)
    exported = fields.has("spo")
    for name in () if exported else sorted(_UNSTORED.keys() & set(fields) - without):
        if fields[name] not in ([], {}, "", False):
            raise RowError(f"the column {name} cannot be used: {_UNSTORED[name]}")
    name = _detect(fields) if format_name == "auto" else format_name
    record = PARSERS[name](fields, defaults)
    for column in () if exported else fields.left():
        if column in _OF_TURNS and column not in without and fields[column] not in ([], {}, ""):
            raise RowError(
                f"the column {column} is of rows of format trl, and this one is of format {name}: "
                f"--format trl, or --without-columns {column}"
            )
    prompt = record.prompt
    if prompt.answer is None and name != "trl":
        prompt = replace(prompt, answer=fields.get("answer"))
    left = fields.left()
    left_out = without & {*left, *(prompt.columns or {})}
    columns = fields.json(name for name in left if name not in without)
    for column in sorted(columns.keys() & RESERVED):
        raise RowError(
            f"the column {column} means something else in rows of format {name}, so that reward "
            f"functions cannot get it by this name: rename it, or --without-columns {column}"
        )
    programs = sorted(columns.keys() & _PROGRAMS)
    judged = prompt.tests is not None or prompt.answer is not None or exported
    if programs and format_name == "auto" and not judged:
        raise RowError(
            f"the columns {', '.join(programs)} are of a problem for programs, and there are no "
            "tests that can be used (--format trl keeps them for a reward function of yours)"
        )
    columns |= {key: value for key, value in (prompt.columns or {}).items() if key not in without}
    prompt = replace(prompt, columns=columns or None)
    return replace(record, prompt=prompt, without=tuple(sorted(left_out)))


def _detect(fields: Fields) -> str:
    columns = set(fields)
    for name, signs in _SIGNS:
        if signs <= columns:
            return name
    raise RowError(f"no known format has just the columns {', '.join(sorted(columns)) or 'none'}")
