"""Hands jobs to workers as they become free and collects the outcomes."""

from __future__ import annotations

import select
import time
from collections import deque
from typing import Literal

from spo_ext.sandbox.jobs import Job, Reply, Unusable, crashed, killed, make_jobs, read_reply
from spo_ext.sandbox.launch import Launcher
from spo_ext.sandbox.records import Limits, Outcome, Program, SandboxError
from spo_ext.sandbox.worker_process import Nursery, WorkerDied, WorkerProcess

# Starved: the machine gave a program too little of its cores, which says nothing about it.
Result = Outcome | Unusable | Literal["starved"]

CANARY = Program("def f(x):\n    return x + 1", calls=((41,),))


# Workers beyond the pool's size: while programs sleep, and to be kept for the next that do.
MOST_ASLEEP, MOST_SPARE = 64, 8


class Pool:
    """Workers of one kind, each started when first needed.

    So many as its size run at a time; a program that sleeps, or waits, needs no core, so it does
    not count.
    """

    def __init__(self, launcher: Launcher, limits: Limits, size: int) -> None:
        self._launcher = launcher
        self._limits = limits
        self._size = size
        self._workers: list[WorkerProcess | None] = []
        self._last_death = ""
        self._nursery = Nursery(launcher, limits) if launcher.has_nursery else None
        self._oom_kills = _oom_kills()

    def run(self, jobs: list[Job]) -> dict[int, Result]:
        """Return results by index of the job. A job is left out if its worker died under it.

        So is one whose program was killed while the kernel killed for want of memory.
        """
        waiting = deque(range(len(jobs)))
        running: dict[int, int] = {}  # Worker's place to index of its job.
        results: dict[int, Result] = {}
        try:
            while waiting or running:
                while waiting and (place := self._free_place(running)) is not None:
                    running[place] = waiting.popleft()
                    self._send(place, jobs[running[place]])
                for place, reply in self._replies(running):
                    index = running.pop(place)
                    result = self._read(jobs[index], reply) if reply else None
                    if result:
                        results[index] = result
                    if reply is None or reply.dirty:
                        self._end(place)
        except BaseException:
            for place in running:  # Their replies must not be taken for those of a later run.
                self._end(place)
            raise
        for place in range(self._size + MOST_SPARE, len(self._workers)):
            self._end(place)
        return results

    def check_canary(self) -> None:
        """Raise SandboxError unless a program of known result runs right."""
        outcome = self.run(make_jobs(CANARY, Limits())).get(0)
        if not isinstance(outcome, Outcome) or outcome.outputs != (42,):
            detail = outcome.reason if isinstance(outcome, Outcome) else self._last_death
            raise SandboxError(f"the {self._launcher.level} sandbox does not work: {detail}")

    def _read(self, job: Job, reply: Reply) -> Result | None:
        if reply.end == "starved":
            return "starved"
        if killed(reply):
            before, self._oom_kills = self._oom_kills, _oom_kills()
            if self._oom_kills != before:
                return None
        try:
            return read_reply(job, reply) or (crashed(job) if killed(reply) else None)
        except Unusable as error:
            return error

    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker is not None]

    def close(self) -> None:
        for place in range(len(self._workers)):
            self._end(place)
        if self._nursery is not None:
            self._nursery.close()

    def _free_place(self, running: dict[int, int]) -> int | None:
        """Where another program can run now, if anywhere."""
        workers = [self._workers[place] for place in running]
        asleep = sum(worker is not None and worker.asleep for worker in workers)
        if len(running) - asleep >= self._size or len(running) >= self._size + MOST_ASLEEP:
            return None
        free = [place for place in range(len(self._workers)) if place not in running]
        if not free:
            self._workers.append(None)
            return len(self._workers) - 1
        return max(free, key=lambda place: self._workers[place] is not None)

    def _send(self, place: int, job: Job) -> None:
        worker = self._workers[place]
        if worker is None or not worker.alive():
            self._end(place)
            worker = self._workers[place] = WorkerProcess(
                self._launcher, self._limits, self._nursery
            )
        worker.send(job)

    def _end(self, place: int) -> None:
        worker = self._workers[place]
        self._workers[place] = None
        if worker is not None:
            worker.close()

    def _replies(self, running: dict[int, int]) -> list[tuple[int, Reply | None]]:
        """Wait until something happens; return who is done, with None for a dead worker."""
        busy = [(place, worker) for place in running if (worker := self._workers[place])]
        poll = select.poll()
        for _, worker in busy:
            poll.register(worker.read_fd, select.POLLIN)
            if worker.sending:
                poll.register(worker.write_fd, select.POLLOUT)
        patience = min(worker.deadline for _, worker in busy) - time.monotonic()
        ready = {fd for fd, _ in poll.poll(max(0.0, patience) * 1000 + 1)}
        finished: list[tuple[int, Reply | None]] = []
        for place, worker in busy:
            try:
                if worker.write_fd in ready:
                    worker.write()
                reply = worker.read() if worker.read_fd in ready else None
            except WorkerDied as death:
                self._last_death = str(death)
                finished.append((place, None))
                continue
            if reply or time.monotonic() > worker.deadline:
                finished.append((place, reply))
        return finished


def _oom_kills() -> str:
    """How many processes this kernel has killed for want of memory, as it writes it."""
    try:
        with open("/proc/vmstat") as file:
            return next((line for line in file if line.startswith("oom_kill ")), "")
    except OSError:
        return ""
