"""Files that outlive a crash, written whole; and those of JSON that others read meanwhile."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of Linux: see renameat2(2).
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and folder in a folder, then the folder itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync(Path(parent, name))
        fsync(Path(parent))


def write_text(path: Path, text: str) -> None:
    """Readers see the old text or the new one, whenever this process, the only writer, dies."""
    temporary = path.with_name(f"{path.name}.tmp")  # that of a killed process is written over
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


def exchange_folders(first: Path, second: Path) -> None:
    """Swaps two folders of one file system.

    In one step where the system can; else in three renames, between which `second` is missing for
    a moment.
    """
    if not _exchange_at_once(first, second):
        aside = second.with_name(f"{second.name}.tmp-old-{os.getpid()}")
        os.rename(second, aside)
        os.rename(first, second)
        os.rename(aside, first)
    fsync(second.parent)


def _exchange_at_once(first: Path, second: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or a C library without it
        return False
    arguments = (os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if renameat2(_AT_FDCWD, *arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # the file system cannot
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


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
