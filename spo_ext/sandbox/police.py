"""What the worker does about the processes of a program: watch, kill, reap.

Two cases. In a PID namespace the worker is process 1: nothing inside can signal it, and one kill
reaches everything else. Without one (the "rlimits" level) the worker is the reaper of its
descendants and hunts them one by one, which a determined program can outrun.
"""

import os
import signal
from typing import Any


def excess(config: dict[str, Any]) -> str:
    """Which limit all processes of the program together exceed, or "" if none."""
    threads = kib = 0
    for pid in _other_processes():
        try:
            with open(f"/proc/{pid}/status") as file:
                status = dict(line.split(":", 1) for line in file)
        except OSError:
            continue  # It has just ended.
        threads += int(status["Threads"])
        for name in ("RssAnon", "RssShmem"):
            kib += int(status.get(name, "0 kB").split()[0])
    if threads > config["processes"]:
        return "processes"
    return "memory" if kib > config["memory_mib"] << 10 else ""


def kill_all() -> None:
    """Kill and reap everything but this worker, daemonised processes too."""
    if os.getpid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)  # One atomic sweep: no fork slips through.
        except ProcessLookupError:
            pass
        _reap()
        return
    while pids := _other_processes():
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except OSError:
                pass  # Gone, or not ours to reap until its own parent is gone.


def _reap() -> None:
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _other_processes() -> list[int]:
    if os.getpid() == 1:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    found: list[int] = []
    unvisited = [os.getpid()]
    while unvisited:
        children = _children(unvisited.pop())
        found += children
        unvisited += children
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                children += map(int, file.read().split())
    except OSError:
        pass  # It has just ended.
    return children
