"""What the worker does about the processes of a program: watch, kill, reap.

Two cases. In a PID namespace the worker is process 1: nothing inside can signal it, and one kill
reaches everything else. Without one (the "rlimits" level) the worker is the reaper of its
descendants and hunts them one by one, which a determined program can outrun.
"""

import os
import signal
import time
from typing import Any

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# The worker itself may come late on a busy machine; so many ticks at most count from look to look.
LONGEST = 2


class Usage:
    """What all processes of a program have used so far, but for the examiner's."""

    def __init__(self, examiner: int) -> None:
        self._examiner = examiner
        self._seen: dict[int, float] = {}  # Process id to the CPU time of its own.
        self._vanished = 0.0
        self._seconds = self.idle = 0.0
        self._looked = time.monotonic()
        self.still = False  # Since the last look.

    def excess(self, limits: dict[str, Any], busy: bool, tick: float) -> str:
        """Which limit the program exceeds, or "" if none; `busy` if it has just written.

        `tick` is the time from look to look.
        """
        threads = kib = 0
        own: dict[int, float] = {}
        with_children, runs = 0.0, busy
        for pid in _other_processes():
            try:
                state, ours, theirs, count = _stat(f"/proc/{pid}/stat")
                runs = runs or state == "R" or (count > 1 and _any_runs(pid))
                if pid == self._examiner:
                    continue
                kib += _kib(pid)
            except OSError:
                continue  # It has just ended.
            threads += count
            own[pid] = ours
            with_children += ours + theirs
        self._count(own, with_children, runs, tick)
        if threads > limits["processes"]:
            return "processes"
        if kib > limits["memory_mib"] << 10:
            return "memory"
        if self._seconds > limits["cpu_seconds"]:
            return "cpu"
        return "wall" if self.idle > limits["wall_seconds"] else ""

    def _count(self, own: dict[int, float], with_children: float, runs: bool, tick: float) -> None:
        """Children that nobody waits for are in no sum of their parent's, so they count apart."""
        self._vanished += sum(time for pid, time in self._seen.items() if pid not in own)
        self._seen = own
        seconds = max(with_children, sum(own.values()) + self._vanished)
        now = time.monotonic()
        self.still = not runs and seconds <= self._seconds
        if self.still:
            self.idle += min(now - self._looked, LONGEST * tick)
        self._seconds, self._looked = max(seconds, self._seconds), now


def _stat(path: str) -> tuple[str, float, float, int]:
    """State, CPU seconds of its own and of children that it waited for, number of threads."""
    with open(path) as file:
        fields = file.read().rpartition(")")[2].split()
    user, system, childrens_user, childrens_system = map(int, fields[11:15])
    own, children = user + system, childrens_user + childrens_system
    return fields[0], own / TICKS_PER_SECOND, children / TICKS_PER_SECOND, int(fields[17])


def _any_runs(pid: int) -> bool:
    tasks = os.listdir(f"/proc/{pid}/task")
    return any(_stat(f"/proc/{pid}/task/{task}/stat")[0] == "R" for task in tasks)


def _kib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return sum(int(status.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))


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
