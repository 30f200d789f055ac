"""JSON files that processes write while others read them, or that died while writing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo_ext.durable import write_text


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; a last line without its end is not finished and left out.

    Raises ValueError for any other line that is no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} must be a JSON object, got {line[:80]!r}")
            yield row


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError unless it is a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def cut_unfinished_line(path: Path) -> None:
    """Removes what a process that died has left behind the last end of a line.

    For before a file is appended to: in the midst of it such a line could not be read.
    """
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def write_json(path: Path, value: object) -> None:
    """The file appears when it is complete."""
    write_text(path, json.dumps(value, indent=1) + "\n")
