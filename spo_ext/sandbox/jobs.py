"""From a program to the requests a worker takes, and from its replies to an Outcome.

The lines read here are the examiner's, whose texts are short; values in them a hostile program may
have made, and the examiner has decoded the same within its limits. A script's are its own.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from spo_ext.sandbox.codec import MAX_TEXT, STARTED, decode, encode
from spo_ext.sandbox.records import (
    Limits,
    Outcome,
    Program,
    Raised,
    Status,
    StdinProgram,
    Submission,
)

# So often may the limits of CPU and wall time pass before a machine counts as too busy to judge.
STARVATION = 60
EXAM_STARTED = b'["started"]\n'


@dataclass(frozen=True)
class Reply:
    """The worker's account of one run, and what was written: by a script, or by the examiner.

    The statuses are as of `wait`, None for a process that the worker has ended.
    """

    end: str
    program_status: int | None
    exam_status: int | None
    seconds: float
    dirty: bool
    result: bytes
    stdout: bytes


@dataclass(frozen=True)
class Job:
    """One request to a worker: all calls of a Program, or one input of a StdinProgram."""

    request: bytes
    outputs: int  # as many as the outcome has
    script: bool
    limits: Limits


@dataclass(frozen=True)
class Judged:
    """Stands where an output would: whether it is the expected one, in each reading of it."""

    as_is: bool
    unwrapped: bool


class Unusable(Exception):
    """The tests cannot judge any program."""


def starved_seconds(limits: Limits) -> float:
    """After so long on the clock, a run that is at no limit yet says nothing but of the machine."""
    return STARVATION * (limits.cpu_seconds + limits.wall_seconds)


def make_jobs(program: Program | StdinProgram, limits: Limits) -> list[Job]:
    """Jobs to run a program. Raises TypeError or ValueError if an argument is not plain data."""
    if isinstance(program, StdinProgram):
        return _scripts(program, [limits] * len(program.inputs))
    return [_calls(program, None, "equal", False, limits)]


def judging_jobs(submission: Submission, default: Limits) -> list[Job]:
    """Jobs to judge a submission; only scripts' outputs come back, to be compared here.

    Raises TypeError or ValueError if an argument or an expected output is not plain data.
    """
    program, limits = submission.program, submission.limits or default
    if isinstance(program, StdinProgram):
        for value in submission.expected:
            if not isinstance(value, str):
                raise TypeError(
                    f"the expected output of a script must be str, got {type(value).__name__}"
                )
        sizes = [len(text.encode(errors="replace")) for text in map(str, submission.expected)]
        return _scripts(program, [_enough(limits, size) for size in sizes])
    if submission.check is not None:
        check = submission.check
        exam = {
            "entry_point": program.entry_point,
            "check": check.source,
            "prefix": check.prefix,
            "calls_check": check.function,
        }
        return [Job(_request(program.source, exam, limits, script=False), 1, False, limits)]
    try:
        expected = [encode(value) for value in submission.expected]
    except TypeError as error:
        raise TypeError(f"an expected output must be plain data: {error}") from None
    relation = submission.relation or "equal"
    limits = _enough(limits, sum(len(json.dumps(value)) for value in expected))
    return [_calls(program, expected, relation, submission.wrapped, limits)]


def merge(results: Sequence[Outcome | Unusable]) -> Outcome | Unusable:
    """One Outcome of the jobs of one program: the first bad status stands for the whole."""
    if len(results) == 1:
        return results[0]
    outcomes = [result for result in results if isinstance(result, Outcome)]  # All: of a script.
    bad = next((outcome for outcome in outcomes if outcome.status != "ok"), None)
    return Outcome(
        status=bad.status if bad else "ok",
        outputs=tuple(output for outcome in outcomes for output in outcome.outputs),
        reason=bad.reason if bad else "",
        seconds=sum(outcome.seconds for outcome in outcomes),
    )


def read_reply(job: Job, reply: Reply) -> Outcome | None:
    """The outcome of a run, or None if it ended before the program began.

    Raises Unusable if the examiner found that the tests say nothing about any program.
    """
    if not reply.result.startswith(STARTED if job.script else EXAM_STARTED):
        return None
    status, reason = _ending(reply, job.limits)
    if job.script:
        return _read_script(reply, status, reason)
    return _read_exam(reply, status, reason, job.outputs)


def killed(reply: Reply) -> bool:
    """Whether somebody else than the worker killed the program or its examiner.

    They may have done it themselves, but so does the kernel when out of memory.
    """
    statuses = (reply.program_status, reply.exam_status)
    return any(status is not None and os.WTERMSIG(status) == signal.SIGKILL for status in statuses)


def crashed(job: Job) -> Outcome:
    """The outcome of a job that kills its worker whenever it runs."""
    reason = "killed itself or its worker, also when it ran alone"
    return Outcome("crashed", (Raised(reason),) * job.outputs, reason, seconds=0.0)


def _scripts(program: StdinProgram, limits: Sequence[Limits]) -> list[Job]:
    return [
        Job(_request(program.source, text, each, script=True), 1, True, each)
        for text, each in zip(program.inputs, limits, strict=True)
    ]


def _calls(
    program: Program, expected: list[object] | None, relation: str, wrapped: bool, limits: Limits
) -> Job:
    exam = {
        "entry_point": program.entry_point,
        "calls": [encode(list(arguments)) for arguments in program.calls],
        "expected": expected,
        "relation": relation,
        "wrapped": wrapped,
    }
    request = _request(program.source, exam, limits, script=False)
    return Job(request, len(program.calls), False, limits)


def _request(source: str, other: object, limits: Limits, script: bool) -> bytes:
    given = {**asdict(limits), "starved_seconds": starved_seconds(limits)}
    header = {"limits": given, "script": script}
    program = {"source": source, "script": script}
    text = other.encode() if isinstance(other, str) else json.dumps(other).encode()
    parts = [json.dumps(header).encode(), json.dumps(program).encode(), text]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _enough(limits: Limits, size: int) -> Limits:
    """The same with room for outputs of such a size, as a power of two, which tells little."""
    if 2 * size <= limits.output_bytes:
        return limits
    return Limits(**{**asdict(limits), "output_bytes": 1 << (2 * size).bit_length()})


def _ending(reply: Reply, limits: Limits) -> tuple[Status, str]:
    if reply.end == "wall":
        return "timeout", f"ran longer than {limits.wall_seconds} s without using a core"
    if reply.end == "memory":
        return "memory", f"used more than {limits.memory_mib} MiB"
    if reply.end == "output":
        return "output", f"wrote more than {limits.output_bytes} bytes"
    if reply.end == "processes":
        return "error", f"had more than {limits.processes} processes or threads"
    code = 0 if reply.program_status is None else os.waitstatus_to_exitcode(reply.program_status)
    if reply.end == "cpu" or code == -signal.SIGXCPU:
        return "timeout", f"used more than {limits.cpu_seconds} s of CPU time"
    if code < 0:
        return "crashed", f"killed by signal {-code}"
    return "ok", ""


def _read_script(reply: Reply, status: Status, reason: str) -> Outcome:
    code = 0 if reply.program_status is None else os.waitstatus_to_exitcode(reply.program_status)
    if status == "ok" and code != 0:
        status, reason = "error", f"ended with exit code {code}"
        try:
            kind, text = json.loads(reply.result[len(STARTED) :][: 8 * MAX_TEXT])
            if kind == "failed":
                status, reason = _failure_status(text), str(text)[:MAX_TEXT]
        except (ValueError, TypeError, RecursionError):
            pass
    output: object = reply.stdout.decode("utf-8", "replace") if status == "ok" else Raised(reason)
    return Outcome(status, (output,), reason, reply.seconds)


def _read_exam(reply: Reply, status: Status, reason: str, calls: int) -> Outcome:
    outputs: list[object] = []
    end = None
    for line in reply.result.split(b"\n")[1:-1]:  # Past the last newline: at most half a line.
        kind, *content = json.loads(line)
        if kind == "returned":
            outputs.append(decode(content[0]))
        elif kind == "raised":
            outputs.append(Raised(content[0]))
        elif kind == "judged":
            outputs.append(Raised(content[2]) if content[2:] else Judged(*content))
        elif kind == "broken":
            raise Unusable(content[0])
        else:
            end = (kind, *content)
    if status == "ok" and end != ("done",):
        status, reason = _failed_exam(reply, end, f"after {len(outputs)} of {calls} calls")
    missing = Raised(f"not returned: {reason}")
    outputs += [missing] * (calls - len(outputs))
    return Outcome(status, tuple(outputs), reason, reply.seconds)


def _failed_exam(reply: Reply, end: tuple[str, ...] | None, when: str) -> tuple[Status, str]:
    if end == ("flood",):
        return "output", "returned more than it may"
    if end is None:
        status = reply.exam_status or 0
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGPROF):
            return "timeout", f"its results took too much CPU time to read or compare, {when}"
        return "crashed", f"its examiner was killed {when}"
    if end[1]:
        return _failure_status(end[1]), end[1]
    code = 0 if reply.program_status is None else os.waitstatus_to_exitcode(reply.program_status)
    return "error", f"ended with exit code {code} {when}"


def _failure_status(failure: str) -> Status:
    return "memory" if failure.startswith("MemoryError") else "error"
