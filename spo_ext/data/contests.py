"""Rows of CodeContests, TACO and APPS, and of LiveCodeBench: tests by stdin or by calls."""

from __future__ import annotations

import base64
import binascii
import io
import pickle
import pickletools
import re
import zlib
from collections.abc import Sequence
from typing import Any

from spo_ext.data.records import (
    Defaults,
    Record,
    Row,
    RowError,
    as_json,
    optional_text,
    parse_json,
    parsed,
    shown,
    solution,
    strings,
    text,
)
from spo_ext.data.tests import call_tests, stdin_tests
from spo_ext.store.records import Prompt

# No GLOBAL, REDUCE, BUILD, INST, OBJ, NEWOBJ, EXT or PERSID: what is listed makes text, numbers
# and containers, or keeps them for later use.
_ALLOWED = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST LIST "
    "APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS PUT "
    "BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET".split()
)
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def unpickle(data: bytes, max_bytes: int) -> Any:
    """Text, numbers, None, lists, tuples and dicts from a pickle.

    Raises ValueError for a pickle that would make anything else, or a value that, written out,
    has more than max_bytes characters or more parts than the pickle has bytes.
    """
    try:
        for operation, argument, position in pickletools.genops(data):
            if operation.name not in _ALLOWED:
                raise ValueError(f"a pickle must not use {operation.name} (at byte {position})")
            # The memo is an array, and the index of an enemy would be its length.
            if operation.name in _PUTS and (argument or 0) > len(data):
                raise ValueError(f"a pickle must not keep a value as number {argument}")
        value = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # pickle promises no list of what it raises on bad bytes
        raise ValueError(f"unreadable pickle: {error}") from None
    _check_size(value, len(data), max_bytes)
    return value


class _Unpickler(pickle.Unpickler):
    """The second lock, should the list above ever hold too much."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a pickle must not name {module}.{name}")

    def persistent_load(self, _key: Any) -> Any:
        raise pickle.UnpicklingError("a pickle must not name persistent objects")


def _check_size(value: Any, max_parts: int, max_bytes: int) -> None:
    """A few bytes can name one list many times over, or put it into itself."""
    waiting, parts, size = [value], 0, 0
    while waiting:
        item = waiting.pop()
        parts += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
        if parts + len(waiting) > max_parts or size > max_bytes:
            raise ValueError("unreadable pickle: it unfolds to more than it holds")


_PYTHON_3 = (3, "PYTHON3")  # CodeContests; solutions in other languages cannot be judged
_MAX_UNPACKED = 512 << 20
# What the official graders give a test, and here at most to all calls of a function together.
_APPS_SECONDS, _LIVECODEBENCH_SECONDS, _CALLS_SECONDS = 4, 6, 12
_MEMORY_MIB = 1024
_SEVERAL = re.compile(
    r"(?:multiple|several|many|more than one|any)\s+(?:\w+\s+){0,3}"
    r"(?:answers?|solutions?|ways?|options?|of\s+them)|"
    r"(?:print|output|return|find)\s+any\b",
    re.IGNORECASE,
)


def parse_code_contests(row: Row, defaults: Defaults) -> Record:
    """All tests, public or not, and the solutions in Python 3, right and wrong. Raises RowError."""
    content = text(row, "description")
    if optional_text(row, "input_file") or optional_text(row, "output_file"):
        raise RowError("it reads or writes a file, not stdin and stdout")
    inputs: list[str] = []
    outputs: list[str] = []
    for name in ("public_tests", "private_tests", "generated_tests"):
        inputs += strings(_struct(row, name), "input")
        outputs += strings(_struct(row, name), "output")
    tests = stdin_tests(inputs, outputs, relation="tokens", limits=_own_limits(row))
    origin, completions, foreign = defaults.origin_of("code_contests"), [], 0
    for name, reward in (("solutions", 1.0), ("incorrect_solutions", 0.0)):
        struct = _struct(row, name)
        sources, languages = strings(struct, "solution"), struct.get("language") or []
        if len(sources) != len(languages):
            raise RowError(f"{name} has {len(sources)} sources and {len(languages)} languages")
        for source, language in zip(sources, languages, strict=True):
            if language in _PYTHON_3 and source.strip():
                completions.append(solution(source, reward, origin))
            else:
                foreign += 1
    prompt = Prompt(content, tests=tests, split=defaults.split_of(row))
    return Record(prompt, tuple(completions), foreign=foreign, notes=_notes(content))


def parse_taco(row: Row, defaults: Defaults) -> Record:
    """Raises RowError."""
    return _parse_question(row, defaults, "taco")


def parse_apps(row: Row, defaults: Defaults) -> Record:
    """Raises RowError."""
    return _parse_question(row, defaults, "apps")


def parse_livecodebench(row: Row, defaults: Defaults) -> Record:
    """Raises RowError."""
    cases = [*_cases(parsed(row, "public_test_cases")), *_private_cases(row)]
    kinds = {case.get("testtype") for case in cases}
    inputs = [optional_text(case, "input") for case in cases]
    outputs = [optional_text(case, "output") for case in cases]
    metadata = parsed(row, "metadata") or {}
    if not isinstance(metadata, dict):
        raise RowError(f"metadata must be an object, got {shown(metadata)}")
    if kinds == {"functional"}:
        name = metadata.get("func_name")
        lines = [[line for line in item.split("\n") if line.strip()] for item in inputs]
        calls = [[parse_json("input", line) for line in item] for item in lines]
        results = [parse_json("output", item) for item in outputs]
        limits = _limits_of_calls(_LIVECODEBENCH_SECONDS, calls)
        tests = call_tests(name, calls, results, relation="json", limits=limits)
    elif kinds <= {"stdin"}:
        tests = stdin_tests(inputs, outputs, limits=_limits(_LIVECODEBENCH_SECONDS))
    else:
        raise RowError(f"testtype must be stdin or functional in all tests, got {shown(kinds)}")
    content = _with_starter(text(row, "question_content"), row)
    more = {key: value for key, value in metadata.items() if key != "func_name"}
    columns = {"metadata": as_json("metadata", more)} if more else None
    prompt = Prompt(content, tests=tests, split=defaults.split_of(row), columns=columns)
    return Record(prompt, notes=_notes(content))


def _parse_question(row: Row, defaults: Defaults, data_set: str) -> Record:
    content = _with_starter(text(row, "question"), row)
    given = parsed(row, "input_output") or {}
    if not isinstance(given, dict):
        raise RowError(f"input_output must be an object, got {shown(given)}")
    tests = question_tests(given)
    solutions = strings({"solutions": parsed(row, "solutions")}, "solutions")
    origin = defaults.origin_of(data_set)
    completions = [solution(source, 1.0, origin) for source in solutions if source.strip()]
    prompt = Prompt(content, tests=tests, split=defaults.split_of(row))
    return Record(prompt, tuple(completions), notes=_notes(content))


def question_tests(given: Row) -> dict[str, Any]:
    """Tests of inputs, outputs and perhaps fn_name, as APPS has them. Raises RowError."""
    inputs, outputs = given.get("inputs") or [], given.get("outputs") or []
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise RowError("inputs and outputs must be lists")
    if given.get("fn_name"):
        calls = [_with_number_keys(arguments) for arguments in inputs]
        wrapped = all(isinstance(item, list) and len(item) == 1 for item in outputs)
        limits = _limits_of_calls(_APPS_SECONDS, calls)
        return call_tests(
            given["fn_name"], calls, outputs, relation="json", wrapped=wrapped, limits=limits
        )
    texts = [_lines(item) for item in inputs], [_lines(item) for item in outputs]
    return stdin_tests(*texts, limits=_limits(_APPS_SECONDS))


def _with_starter(question: str, row: Row) -> str:
    starter = optional_text(row, "starter_code")
    return f"{question}\n\nStart from this code:\n{starter}" if starter.strip() else question


def _with_number_keys(arguments: Any) -> Any:
    """A first argument that is a dict has whole numbers as keys where all its texts are such."""
    if not isinstance(arguments, list) or not arguments or not isinstance(arguments[0], dict):
        return arguments
    keys = arguments[0]
    if not all(key.lstrip("-").isdecimal() for key in keys):
        return arguments
    return [{int(key): value for key, value in keys.items()}, *arguments[1:]]


def _own_limits(row: Row) -> dict[str, float]:
    """What the contest allowed, where the row says it."""
    limits: dict[str, float] = {}
    time, memory = row.get("time_limit"), row.get("memory_limit_bytes")
    if isinstance(time, dict):
        seconds = (time.get("seconds") or 0) + (time.get("nanos") or 0) / 1e9
    else:
        seconds = time or 0
    for name, value in (("time_limit", seconds), ("memory_limit_bytes", memory or 0)):
        if not isinstance(value, int | float) or not 0 <= value < 1 << 50:
            raise RowError(f"{name} must be a number that is not negative, got {shown(value)}")
    if seconds:
        limits["cpu_seconds"] = seconds
    if memory:
        limits["memory_mib"] = max(1, memory >> 20)
    return limits


def _limits(seconds: float) -> dict[str, float]:
    return {"cpu_seconds": seconds, "memory_mib": _MEMORY_MIB}


def _limits_of_calls(seconds: float, calls: Sequence[Any]) -> dict[str, float]:
    return _limits(min(seconds * max(1, len(calls)), _CALLS_SECONDS))


def _notes(question: str) -> tuple[str, ...]:
    """Says so where several answers are right, since there is no checker to know them all."""
    found = _SEVERAL.search(question)
    if found is None:
        return ()
    words = " ".join(found.group().split())
    return (f"it may have several right answers ({words}); only the one in its tests gets 1",)


def _lines(value: Any) -> Any:
    """Some rows hold a text as a list of its lines."""
    lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return "\n".join(value) if lines else value


def _struct(row: Row, name: str) -> dict[str, Any]:
    value = row.get(name)
    if value is not None and not isinstance(value, dict):
        raise RowError(f"{name} must be an object of lists, got {shown(value)}")
    return value or {}


def _private_cases(row: Row) -> list[dict[str, Any]]:
    """JSON, or JSON in a pickle, compressed, in base64."""
    value = optional_text(row, "private_test_cases").strip()
    if not value or value.startswith("["):
        return _cases(parsed(row, "private_test_cases"))
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(value, validate=True), _MAX_UNPACKED)
        if not unpacker.eof:
            raise ValueError(f"cut off, or more than {_MAX_UNPACKED >> 20} MiB")
        content = unpickle(data, _MAX_UNPACKED)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise RowError(f"private_test_cases cannot be read: {error}") from None
    if isinstance(content, str):
        content = parse_json("private_test_cases", content)
    return _cases(content)


def _cases(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(case, dict) for case in value):
        raise RowError(f"test cases must be a list of objects, got {shown(value)}")
    return value
