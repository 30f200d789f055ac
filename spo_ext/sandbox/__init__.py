"""Judge of model-written Python programs: a reward that the program cannot write itself.

    with Sandbox() as sandbox:
        verdicts = judge(sandbox, [Submission(Program(source, "f", ((2,), (3,))), (4, 9))])

A program sees its source and its arguments, never the expected outputs; it runs in a process
without network, files or time to waste; only plain data comes back and is compared here.
"""

from spo_ext.sandbox.launch import Level
from spo_ext.sandbox.records import (
    Check,
    Limits,
    Outcome,
    Program,
    Raised,
    SandboxError,
    Status,
    StdinProgram,
    Submission,
    Verdict,
)
from spo_ext.sandbox.sandbox import Sandbox, probe_levels
from spo_ext.sandbox.verdict import agree, judge

__all__ = [
    "Check",
    "Level",
    "Limits",
    "Outcome",
    "Program",
    "Raised",
    "Sandbox",
    "SandboxError",
    "Status",
    "StdinProgram",
    "Submission",
    "Verdict",
    "agree",
    "judge",
    "probe_levels",
]
