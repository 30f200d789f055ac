"""The plain values that go into the sandbox and come out of it.

Nothing here knows how programs are run, so a caller can build, store and compare these records
without starting a process.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Status = Literal["ok", "error", "timeout", "memory", "output", "crashed"]


class SandboxError(RuntimeError):
    """The sandbox itself failed. It says nothing about the program: retry, never score it."""


@dataclass(frozen=True)
class Limits:
    """What one run may use: all calls of a Program together, or one input of a StdinProgram.

    Every field must be positive. `memory_mib` bounds the address space of each process and the
    sum over all processes; the sum is sampled every 20 ms, so up to `memory_mib * processes` can
    be reached for that long. `file_bytes` bounds one file and the whole private /tmp.
    `output_bytes` bounds stdout and, apart from it, the encoded return values.
    """

    cpu_seconds: int = 1
    wall_seconds: float = 2.0
    memory_mib: int = 256
    output_bytes: int = 1 << 20
    processes: int = 16
    file_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"Limits.{field.name} must be positive, got {value!r}")


@dataclass(frozen=True)
class Program:
    """Python source that defines `entry_point`, and the argument tuples to call it with.

    Arguments are plain data: None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset.
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
class Submission:
    """A program and the outputs expected of it, one per call. They stay in this process."""

    program: Program | StdinProgram
    expected: tuple[object, ...]

    def __post_init__(self) -> None:
        program = self.program
        runs = program.calls if isinstance(program, Program) else program.inputs
        if not runs or len(runs) != len(self.expected):
            raise ValueError(
                f"Submission.expected must hold one output per call and at least one, "
                f"got {len(self.expected)} for {len(runs)} calls"
            )


@dataclass(frozen=True)
class Verdict:
    """How many of `total` outputs were as expected; `ok` only if all were and the run was clean."""

    passed: int
    total: int
    ok: bool
    reason: str
