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

from spo_ext.sandbox.jobs import Job, Unusable, crashed, make_jobs, merge
from spo_ext.sandbox.launch import LEVELS, Launcher, Level, launchers, package_paths
from spo_ext.sandbox.pool import Pool, Result
from spo_ext.sandbox.records import Limits, Outcome, Program, SandboxError, StdinProgram

ATTEMPTS_ALONE = 2
OPT_IN_VARIABLE = "SPO_ALLOW_UNSANDBOXED"


class Sandbox:
    """Runs untrusted programs on `workers` sandboxed processes (default: one per CPU).

    `level` "auto" takes the strongest level that works here. The level "rlimits" isolates nothing
    and needs `allow_unsandboxed=True` or SPO_ALLOW_UNSANDBOXED=1 in the environment. Raises
    SandboxError if no permitted level works. Workers end with the thread that started them; one
    that has ended is replaced. Use from one thread at a time.

    `packages` names installed packages that programs may import, such as "numpy", by the name of
    the import; each needs those it imports itself named too. Raises ValueError for one that is not
    installed.
    """

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits | None = None,
        level: Level | Literal["auto"] = "auto",
        allow_unsandboxed: bool = False,
        packages: Sequence[str] = (),
    ) -> None:
        count = workers if workers is not None else os.cpu_count() or 1
        if count < 1:
            raise ValueError(f"workers must be at least 1, got {count}")
        self.limits = limits or Limits()
        allowed = allow_unsandboxed or os.environ.get(OPT_IN_VARIABLE) == "1"
        package_paths(packages)
        self._launcher = _choose(level, allowed, self.limits, tuple(packages))
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
        results = self.run_jobs([make_jobs(program, self.limits) for program in programs])
        # What is run without expected outputs or a check has no tests that could be unusable.
        return [outcome for outcome in results if isinstance(outcome, Outcome)]

    def run_jobs(self, jobs_of: Sequence[list[Job]]) -> list[Outcome | Unusable]:
        """Run the jobs of each program; the outcome of them together. Raises SandboxError."""
        if self._closed:
            raise SandboxError("the sandbox is closed")
        jobs = [job for group in jobs_of for job in group]
        results = self._pool.run(jobs)
        ordered = (self._settled(results.get(index), job) for index, job in enumerate(jobs))
        return [merge([next(ordered) for _ in group]) for group in jobs_of]

    def _settled(self, result: Result | None, job: Job) -> Outcome | Unusable:
        return self._run_alone(job) if result is None or result == "starved" else result

    def _run_alone(self, job: Job) -> Outcome | Unusable:
        """Run a job that lost its worker by itself, between canaries."""
        pool = Pool(self._launcher, self.limits, 1)
        try:
            for _ in range(ATTEMPTS_ALONE):
                pool.check_canary()
                done = pool.run([job]).get(0)
                pool.close()
                if isinstance(done, Outcome | Unusable):
                    return done
            pool.check_canary()
        finally:
            pool.close()
        if done == "starved":
            raise SandboxError("this machine is too busy to judge programs: all wait for a core")
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


def _probe(
    level: Level, limits: Limits, packages: tuple[str, ...] = ()
) -> tuple[Launcher | None, str | None]:
    """The first way to reach a level that works, or why the last one did not."""
    reason = ""
    for launcher in launchers(level, packages):
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


def _choose(
    level: Level | Literal["auto"], allowed: bool, limits: Limits, packages: tuple[str, ...]
) -> Launcher:
    """The best launcher that works and is permitted; never a silent step down."""
    wanted = LEVELS if level == "auto" else (level,)
    reasons = []
    for name in wanted:
        if name == "rlimits" and not allowed:
            reasons.append("rlimits: isolates nothing, so it needs your consent")
            continue
        launcher, reason = _probe(name, limits, packages)
        if launcher is not None:
            return launcher
        reasons.append(f"{name}: {reason}")
    raise SandboxError(
        "no permitted sandbox level works here. Install bubblewrap (apt-get install bubblewrap), "
        "in a container also allow user namespaces; or, to run model-written code unprotected, "
        f"pass allow_unsandboxed=True or set {OPT_IN_VARIABLE}=1. Tried: " + "; ".join(reasons)
    )
