"""What the tests of the sandbox share."""

from __future__ import annotations

import textwrap

import pytest
from processes import descendants

from spo_ext.sandbox import (
    Limits,
    Outcome,
    Program,
    Sandbox,
    Submission,
    judge,
    probe_levels,
)

WHY_NOT = probe_levels()
needs_bwrap = pytest.mark.skipif(
    WHY_NOT["bwrap"] is not None, reason=f"bubblewrap does not work here: {WHY_NOT['bwrap']}"
)
FAST = Limits(wall_seconds=1.5, memory_mib=128)
SQUARE = Submission(Program("def f(x): return x * x", calls=((3,), (-4,))), (9, 16))


def run(sandbox: Sandbox, source: str, *arguments: object) -> Outcome:
    """Run f(*arguments) once."""
    return sandbox.run([Program(textwrap.dedent(source), calls=(arguments,))])[0]


def returned(sandbox: Sandbox, expression: str) -> object:
    return run(sandbox, f"def f(): return {expression}").outputs[0]


def paid(sandbox: Sandbox, source: str, expected: object, *arguments: object) -> bool:
    program = Program(textwrap.dedent(source), calls=(arguments,))
    return judge(sandbox, [Submission(program, (expected,))])[0].ok


def only_workers_left(sandbox: Sandbox) -> bool:
    """Whether the machine runs no process of the sandbox but idle workers."""
    return all(len(descendants(outer)) <= 1 for outer in sandbox.worker_pids())
