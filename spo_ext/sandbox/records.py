"""The plain values that go into the sandbox and come out of it.

Nothing here knows how programs are run, so a caller can build, store and compare these records
without starting a process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

Status = Literal["ok", "error", "timeout", "memory", "output", "crashed"]
Relation = Literal["equal", "json", "lines", "tokens"]


class SandboxError(RuntimeError):
    """The sandbox itself failed. It says nothing about the program: retry, never score it."""


@dataclass(frozen=True)
class Limits:
    """What one run may use: all calls of a Program together, or one input of a StdinProgram.

    Every field must be positive. `cpu_seconds` is the CPU time of all its processes and threads.
    `wall_seconds` is the time in which none of them runs or wants to: asleep, or waiting. A machine
    that is busy with other things makes a run longer and uses up neither. `memory_mib` bounds what
    all its processes hold, looked at every 20 ms (60 if asleep); each may reserve 2 GiB more,
    for stacks of threads that are never touched. `file_bytes` bounds one file and the whole private
    /tmp. `output_bytes` bounds stdout and, apart from it, the encoded return values; where more is
    expected, twice that is the limit.
    """

    cpu_seconds: float = 1.0
    wall_seconds: float = 2.0
    memory_mib: int = 256
    output_bytes: int = 1 << 20
    processes: int = 16
    file_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ValueError(f"Limits.{field.name} must be positive, got {value!r}")


@dataclass(frozen=True)
class Program:
    """Python source that defines `entry_point`, and the argument tuples to call it with.

    Where the source has no such name, it may be a method of its class Solution. Arguments are plain
    data: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, Fraction,
    Decimal.
    """

    source: str
    entry_point: str = "f"
    calls: tuple[tuple[object, ...], ...] = ()


@dataclass(frozen=True)
class StdinProgram:
    """A whole script, run once for each text of `inputs`; its output is what it prints."""

    source: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Raised:
    """Stands where an output would: why this call returned no plain data."""

    text: str


@dataclass(frozen=True)
class Outcome:
    """What a program did. `outputs` has one entry per call (or input): a value or a `Raised`.

    "ok" means that every call was made, even if some raised. "error": the source did not load, or
    it ended early. "crashed": it killed itself or its worker by a signal.
    """

    status: Status
    outputs: tuple[object, ...]
    reason: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """Tests as source, such as HumanEval's: it calls the program's `entry_point`, and raises.

    Args:
        source: run where `candidate`, and the name of the entry point, is that function; then, if
            `function`, its `check(candidate)` is called.
        prefix: source that is run before, for what the tests may use; not part of the program.

    It runs in a process of its own inside the sandbox. What it passes to the function, and what
    comes back, is plain data.
    """

    source: str
    prefix: str = ""
    function: bool = False


@dataclass(frozen=True)
class Submission:
    """A program and what is expected of it, which it never sees.

    Args:
        expected: an output for each call or input; or () where there is a check.
        check: of a Program without calls.
        relation: when an output is the expected one. "equal": by Python's `==`. "json": the same,
            but a tuple is a list, keys may be texts, and floats are compared by the tolerance of
            `numpy.allclose`. "lines", of scripts: word by word in each line that is not blank;
            "tokens": word by word; floats by the same tolerance. None: "equal", or "lines".
        wrapped: whether each of `expected` may hold the result in a list of one, as some rows of
            APPS do; then all of them do, or none.
        limits: in place of the sandbox's.
    """

    program: Program | StdinProgram
    expected: tuple[object, ...] = ()
    check: Check | None = None
    relation: Relation | None = None
    wrapped: bool = False
    limits: Limits | None = None

    def __post_init__(self) -> None:
        program = self.program
        runs = program.calls if isinstance(program, Program) else program.inputs
        if self.check is not None:
            if runs or self.expected or not isinstance(program, Program):
                raise ValueError("Submission.check must be of a Program without calls")
            return
        if not runs or len(runs) != len(self.expected):
            raise ValueError(
                f"Submission.expected must hold one output per call and at least one, "
                f"got {len(self.expected)} for {len(runs)} calls"
            )
        known = ("lines", "tokens") if isinstance(program, StdinProgram) else ("equal", "json")
        if self.relation not in (None, *known):
            raise ValueError(
                f"Submission.relation must be one of {known} here, got {self.relation!r}"
            )


@dataclass(frozen=True)
class Verdict:
    """How many of `total` outputs were as expected; `ok` only if all were and the run was clean.

    `unusable` says why the tests cannot judge any program, "" if they can.
    """

    passed: int
    total: int
    ok: bool
    reason: str
    unusable: str = ""
