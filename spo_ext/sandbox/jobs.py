"""From a program to the requests a worker takes, and from its replies to an Outcome.

This is where bytes that a hostile program may have written are read. Whatever they hold, the
result is a list of plain values or a failed outcome; no byte of them is executed.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass

from spo_ext.sandbox.codec import STARTED, decode, encode
from spo_ext.sandbox.records import Limits, Outcome, Program, Raised, Status, StdinProgram
from spo_ext.sandbox.worker_process import Reply


@dataclass(frozen=True)
class Job:
    """One request to a worker: all calls of a Program, or one input of a StdinProgram."""

    request: bytes
    calls: int | None  # None: a script, whose output is its stdout.


def make_jobs(program: Program | StdinProgram) -> list[Job]:
    """Raises TypeError or ValueError if an argument is not plain data, or a text not UTF-8."""
    if isinstance(program, StdinProgram):
        for text in program.inputs:
            text.encode()
        return [Job(_request(source=program.source, stdin=text), None) for text in program.inputs]
    request = _request(
        source=program.source,
        entry_point=program.entry_point,
        calls=[encode(list(arguments)) for arguments in program.calls],
        stdin=None,
    )
    return [Job(request, len(program.calls))]


def merge(outcomes: list[Outcome]) -> Outcome:
    """One Outcome of the jobs of one program: the first bad status stands for the whole."""
    if len(outcomes) == 1:
        return outcomes[0]
    bad = next((outcome for outcome in outcomes if outcome.status != "ok"), None)
    return Outcome(
        status=bad.status if bad else "ok",
        outputs=tuple(output for outcome in outcomes for output in outcome.outputs),
        reason=bad.reason if bad else "",
        seconds=sum(outcome.seconds for outcome in outcomes),
    )


def read_reply(job: Job, reply: Reply, limits: Limits) -> Outcome | None:
    """The outcome of a run, or None if it says nothing about the program.

    That is, if it ended before the program began, or by a SIGKILL that the worker did not send:
    the program may have done that itself, the kernel when out of memory as well.
    """
    code = os.waitstatus_to_exitcode(reply.wait_status)
    killed = reply.end == "exit" and code == -signal.SIGKILL
    if killed or not reply.result.startswith(STARTED):
        return None
    status, reason = _ending(reply.end, code, limits)
    if job.calls is None:
        return _read_script(reply, status, reason, code)
    return _read_calls(reply, status, reason, code, job.calls)


def crashed(job: Job) -> Outcome:
    """The outcome of a job that kills its worker whenever it runs."""
    reason = "killed itself or its worker, also when it ran alone"
    outputs = 1 if job.calls is None else job.calls
    return Outcome("crashed", (Raised(reason),) * outputs, reason, seconds=0.0)


def _request(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def _ending(end: str, code: int, limits: Limits) -> tuple[Status, str]:
    if end == "wall":
        return "timeout", f"ran longer than {limits.wall_seconds} s"
    if end == "memory":
        return "memory", f"used more than {limits.memory_mib} MiB"
    if end == "output":
        return "output", f"wrote more than {limits.output_bytes} bytes"
    if end == "processes":
        return "error", f"had more than {limits.processes} processes or threads"
    if code == -signal.SIGXCPU:
        return "timeout", f"used more than {limits.cpu_seconds} s of CPU time"
    if code < 0:
        return "crashed", f"killed by signal {-code}"
    return "ok", ""


def _read_script(reply: Reply, status: Status, reason: str, code: int) -> Outcome:
    if status == "ok" and code != 0:
        status, reason = "error", f"ended with exit code {code}"
        try:
            _, failure = _read_lines(reply.result[len(STARTED) :], 0)
        except _UNREADABLE:
            failure = ""
        if failure:
            status, reason = _failure_status(failure), failure
    output: object = reply.stdout.decode("utf-8", "replace") if status == "ok" else Raised(reason)
    return Outcome(status, (output,), reason, reply.seconds)


def _read_calls(reply: Reply, status: Status, reason: str, code: int, calls: int) -> Outcome:
    try:
        outputs, failure = _read_lines(reply.result[len(STARTED) :], calls)
    except _UNREADABLE as error:
        outputs, failure = [], f"unreadable results: {type(error).__name__}"
    if status == "ok" and failure:
        status, reason = _failure_status(failure), failure
    elif status == "ok" and len(outputs) < calls:
        status = "error"
        reason = f"ended with exit code {code} after {len(outputs)} of {calls} calls"
    missing = Raised(f"not returned: {reason}")
    outputs += [missing] * (calls - len(outputs))
    return Outcome(status, tuple(outputs), reason, reply.seconds)


# What JSON and `decode` raise on arbitrary bytes.
_UNREADABLE = (ValueError, TypeError, LookupError, RecursionError)


def _read_lines(data: bytes, calls: int) -> tuple[list[object], str]:
    """Outputs of the calls that ended, and what ended the program early, if anything."""
    outputs: list[object] = []
    for line in data.split(b"\n")[:-1]:  # Past the last newline: nothing, or half a line.
        kind, content = json.loads(line)
        if kind == "failed":
            return outputs, str(content)
        if len(outputs) == calls:
            raise ValueError("more results than calls")
        if kind not in ("returned", "raised"):
            raise ValueError("unknown kind of result")
        outputs.append(decode(content) if kind == "returned" else Raised(str(content)))
    return outputs, ""


def _failure_status(failure: str) -> Status:
    return "memory" if failure.startswith("MemoryError") else "error"
