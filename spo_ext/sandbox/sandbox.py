"""The public class: picks a level, keeps order, tells a bad program from a bad sandbox.

A worker that dies says nothing about the program it ran: anybody may have killed it. So that
program is run again alone in a fresh worker, next to a canary whose result is known. Only if it
fails again while the canary does not is it the program's doing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

from spo_ext.sandbox.jobs import Job, crashed, make_jobs, merge
from spo_ext.sandbox.launch import LEVELS, Launcher, Level, launchers
from spo_ext.sandbox.pool import Pool
from spo_ext.sandbox.records import Limits, Outcome, Program, SandboxError, StdinProgram

ATTEMPTS_ALONE = 2
OPT_IN_VARIABLE = "SPO_ALLOW_UNSANDBOXED"


class Sandbox:
    """Runs untrusted programs on `workers` sandboxed processes (default: one per CPU).

    `level` "auto" takes the strongest level that works here. The level "rlimits" isolates nothing
    and needs `allow_unsandboxed=True` or SPO_ALLOW_UNSANDBOXED=1 in the environment. Raises
    SandboxError if no permitted level works. Workers end with the thread that started them; one
    that has ended is replaced. Use from one thread at a time.
    """

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits | None = None,
        level: Level | Literal["auto"] = "auto",
        allow_unsandboxed: bool = False,
    ) -> None:
        count = workers if workers is not None else os.cpu_count() or 1
        if count < 1:
            raise ValueError(f"workers must be at least 1, got {count}")
        self.limits = limits or Limits()
        allowed = allow_unsandboxed or os.environ.get(OPT_IN_VARIABLE) == "1"
        self._launcher = _choose(level, allowed, self.limits)
        self._pool = Pool(self._launcher, self.limits, count)
        self._closed = False
        self._finalizer = weakref.finalize(self, self._pool.close)

    @property
    def level(self) -> Level:
        """The level in force."""
        return self._launcher.level

    def describe(self) -> str:
        """One sentence for a log: what stands between the programs and this machine."""
        return f"sandbox level {self.level}: {self._launcher.describe()}."

    def worker_pids(self) -> list[int]:
        """Process ids of the workers' outermost processes, for monitoring."""
        return self._pool.pids()

    def run(self, programs: Sequence[Program | StdinProgram]) -> list[Outcome]:
        """Run all programs and return their outcomes in the same order.

        Raises SandboxError if the sandbox failed, TypeError or ValueError if an argument of a call
        is not plain data. Whatever a program does becomes its outcome.
        """
        if self._closed:
            raise SandboxError("the sandbox is closed")
        jobs_of = [make_jobs(program) for program in programs]
        jobs = [job for group in jobs_of for job in group]
        outcomes = self._pool.run(jobs)
        ordered = (
            outcomes[index] if index in outcomes else self._run_alone(job)
            for index, job in enumerate(jobs)
        )
        return [merge([next(ordered) for _ in group]) for group in jobs_of]

    def _run_alone(self, job: Job) -> Outcome:
        """Run a job that lost its worker by itself, between canaries."""
        pool = Pool(self._launcher, self.limits, 1)
        try:
            for _ in range(ATTEMPTS_ALONE):
                pool.check_canary()
                done = pool.run([job])
                pool.close()
                if done:
                    return done[0]
            pool.check_canary()
        finally:
            pool.close()
        return crashed(job)

    def close(self) -> None:
        """End all workers. Called on leaving a `with` block and at interpreter exit."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def probe_levels() -> dict[Level, str | None]:
    """For each level None if it works on this machine, else the reason why not."""
    return {level: _probe(level, Limits())[1] for level in LEVELS}


def _probe(level: Level, limits: Limits) -> tuple[Launcher | None, str | None]:
    """The first way to reach a level that works, or why the last one did not."""
    reason = ""
    for launcher in launchers(level):
        reason = launcher.missing()
        if reason:
            continue
        pool = Pool(launcher, limits, 1)
        try:
            pool.check_canary()
            return launcher, None
        except SandboxError as error:
            reason = str(error)
        finally:
            pool.close()
    return None, reason


def _choose(level: Level | Literal["auto"], allowed: bool, limits: Limits) -> Launcher:
    """The best launcher that works and is permitted; never a silent step down."""
    wanted = LEVELS if level == "auto" else (level,)
    reasons = []
    for name in wanted:
        if name == "rlimits" and not allowed:
            reasons.append("rlimits: isolates nothing, so it needs your consent")
            continue
        launcher, reason = _probe(name, limits)
        if launcher is not None:
            return launcher
        reasons.append(f"{name}: {reason}")
    raise SandboxError(
        "no permitted sandbox level works here. Install bubblewrap (apt-get install bubblewrap), "
        "in a container also allow user namespaces; or, to run model-written code unprotected, "
        f"pass allow_unsandboxed=True or set {OPT_IN_VARIABLE}=1. Tried: " + "; ".join(reasons)
    )
