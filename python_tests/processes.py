"""Processes of this machine, which may end while somebody looks at them, and its ports."""

import socket
import time
from collections.abc import Callable
from pathlib import Path


def descendants(root: int) -> list[int]:
    """Process ids below `root`, as this machine sees them."""
    parent_of = {}
    for entry in Path("/proc").iterdir():
        fields = (
            _read(entry.name, "stat").rpartition(")")[2].split() if entry.name.isdigit() else []
        )
        if fields:
            parent_of[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parent_of.items() if parent == pid]
    return found[1:]


def alive(pid: int) -> bool:
    """Whether it runs; one that ended and that nobody has waited for does not."""
    return _read(pid, "stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def command_line(pid: int) -> str:
    """Its words with a NUL after each; nothing of one that has ended."""
    return _read(pid, "cmdline")


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def free_port() -> int:
    """Of loopback; free until somebody takes it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _read(pid: int | str, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
