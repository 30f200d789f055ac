"""Hands jobs to workers as they become free and collects the outcomes."""

from __future__ import annotations

import select
import time
from collections import deque

from spo_ext.sandbox.jobs import Job, make_jobs, read_reply
from spo_ext.sandbox.launch import Launcher
from spo_ext.sandbox.records import Limits, Outcome, Program, SandboxError
from spo_ext.sandbox.worker_process import Reply, WorkerDied, WorkerProcess

CANARY = Program("def f(x):\n    return x + 1", calls=((41,),))


class Pool:
    """Workers of one kind, each started when first needed."""

    def __init__(self, launcher: Launcher, limits: Limits, size: int) -> None:
        self._launcher = launcher
        self._limits = limits
        self._workers: list[WorkerProcess | None] = [None] * size
        self._last_death = ""

    def run(self, jobs: list[Job]) -> dict[int, Outcome]:
        """Return outcomes by index of the job. A job is left out if its worker died under it."""
        waiting = deque(range(len(jobs)))
        running: dict[int, int] = {}  # Worker's place to index of its job.
        outcomes: dict[int, Outcome] = {}
        try:
            while waiting or running:
                for place in range(len(self._workers)):
                    if waiting and place not in running:
                        running[place] = waiting.popleft()
                        self._send(place, jobs[running[place]])
                for place, reply in self._replies(running):
                    index = running.pop(place)
                    outcome = reply and read_reply(jobs[index], reply, self._limits)
                    if outcome:
                        outcomes[index] = outcome
                    if reply is None or reply.dirty:
                        self._end(place)
        except BaseException:
            for place in running:  # Their replies must not be taken for those of a later run.
                self._end(place)
            raise
        return outcomes

    def check_canary(self) -> None:
        """Raise SandboxError unless a program of known result runs right."""
        outcome = self.run(make_jobs(CANARY)).get(0)
        if outcome is None or outcome.status != "ok" or outcome.outputs != (42,):
            detail = outcome.reason if outcome else self._last_death
            raise SandboxError(f"the {self._launcher.level} sandbox does not work: {detail}")

    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker is not None]

    def close(self) -> None:
        for place in range(len(self._workers)):
            self._end(place)

    def _send(self, place: int, job: Job) -> None:
        worker = self._workers[place]
        if worker is None or not worker.alive():
            self._end(place)
            worker = self._workers[place] = WorkerProcess(self._launcher, self._limits)
        worker.send(job.request)

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
