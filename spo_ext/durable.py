"""Files that outlive a crash: written whole and flushed, then renamed into place."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

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
