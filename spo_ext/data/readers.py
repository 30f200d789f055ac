"""Rows of a file one after the other: JSONL, JSONL in gzip, Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo_ext.data.records import RowError, shown, whole_number

Numbered = tuple[int, "dict[str, Any] | RowError"]
_ROWS = 64  # of Parquet at a time: a row may have megabytes of tests
_CHAT = ("prompt", "completion", "messages", "chosen", "rejected")


def read_rows(path: Path) -> Iterator[Numbered]:
    """Line or row numbers from 1 on, each with its row or with why it is none.

    Raises OSError if the file cannot be opened, ValueError if its kind is unknown, ImportError for
    Parquet without pyarrow.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_lines(path)
    else:
        raise ValueError(f"{path}: a file must end in .jsonl, .jsonl.gz or .parquet")


def need_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. Raises ImportError that says how to get them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"Parquet needs pyarrow ({error}): pip install 'spo_ext[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _read_lines(path: Path) -> Iterator[Numbered]:
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):  # noqa: B007
                if line.strip():
                    yield number, _row(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield number + 1, RowError(f"the file cannot be read from here on: {error}")


def _row(line: bytes) -> dict[str, Any] | RowError:
    try:
        row = json.loads(line, parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        return RowError(f"no JSON: {error}")
    return row if isinstance(row, dict) else RowError(f"a row must be an object, got {shown(row)}")


def _read_parquet(path: Path) -> Iterator[Numbered]:
    pyarrow, parquet = need_pyarrow()
    number = 0
    with open(path, "rb") as handle:
        try:
            with parquet.ParquetFile(handle) as file:
                for batch in file.iter_batches(batch_size=_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        row.update({name: _without_none(row.get(name)) for name in _CHAT})
                        yield number, row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            yield number + 1, RowError(f"the file cannot be read from here on: {error}")


def _without_none(messages: Any) -> Any:
    """A column of messages has every key of any of them; None stands where there was none."""
    if not isinstance(messages, list):
        return messages
    return [
        {key: value for key, value in item.items() if value is not None}
        if isinstance(item, dict)
        else item
        for item in messages
    ]
