"""Which parser reads a row, by the columns it has."""

from __future__ import annotations

from collections.abc import Callable

from spo_ext.data.contests import (
    parse_apps,
    parse_code_contests,
    parse_livecodebench,
    parse_taco,
)
from spo_ext.data.evalplus import parse_evalplus
from spo_ext.data.functions import parse_humaneval, parse_mbpp
from spo_ext.data.records import Defaults, Record, Row, RowError
from spo_ext.data.trl import parse_trl

Parser = Callable[[Row, Defaults], Record]

PARSERS: dict[str, Parser] = {
    "trl": parse_trl,
    "code_contests": parse_code_contests,
    "taco": parse_taco,
    "apps": parse_apps,
    "mbpp": parse_mbpp,
    "humaneval": parse_humaneval,
    "evalplus": parse_evalplus,
    "livecodebench": parse_livecodebench,
}

# The first whose columns are all there; TRL's may have any others besides its own.
_SIGNS = (
    ("trl", {"spo"}),
    ("code_contests", {"description", "public_tests"}),
    ("livecodebench", {"question_content", "public_test_cases"}),
    ("apps", {"question", "input_output", "problem_id"}),
    ("taco", {"question", "input_output"}),
    ("mbpp", {"test_list"}),
    ("evalplus", {"prompt", "entry_point", "canonical_solution", "base_input"}),
    ("humaneval", {"prompt", "entry_point", "test"}),
    ("trl", {"prompt"}),
    ("trl", {"messages"}),
)


def parse_row(row: Row, format_name: str, defaults: Defaults) -> Record:
    """Raises RowError, or ValueError of the records, for a row that says nothing usable."""
    return PARSERS[_detect(row) if format_name == "auto" else format_name](row, defaults)


def _detect(row: Row) -> str:
    columns = {name for name, value in row.items() if value is not None}
    for name, signs in _SIGNS:
        if signs <= columns:
            return name
    raise RowError(f"no known format has just the columns {', '.join(sorted(columns)) or 'none'}")
