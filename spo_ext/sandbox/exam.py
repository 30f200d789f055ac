"""The process that calls a program's functions and looks at what they return: the examiner.

It runs inside the sandbox, for the results are a hostile program's: to read or to compare them can
take any time. But it runs none of the program: what the program returns comes as plain data over a
pipe, so that built-in types alone decide what is equal. Expected results are in this process only,
which the program can neither read nor write, and its own pipe to the worker is closed to the
program. The program can stop or kill it, and fails.
"""

import builtins
import contextlib
import json
import os
import select
import signal
from typing import Any, NoReturn

from spo_ext.sandbox.child import RESULT_FD
from spo_ext.sandbox.codec import MAX_TEXT, STARTED, decode, describe, encode
from spo_ext.sandbox.relation import equal, equal_as_json

ANSWERS_FD, CALLS_FD = 4, 5
# CPU time to read one result, for each MiB that a program may return: keys that collide take
# quadratic time in a dict.
READ_SECONDS = 0.5
RELATIONS = {"equal": equal, "json": equal_as_json}


def read_seconds(max_bytes: int) -> float:
    return READ_SECONDS * max(1.0, max_bytes / (1 << 20))


class ProgramError(Exception):
    """What the program raised, where it is no built-in exception, or the cause of one that is."""


class ProgramEnded(BaseException):
    """The program says nothing more; the text is why. No test can catch it by accident."""


class Flood(BaseException):
    """The program has written more than it may."""


class ExamError(BaseException):
    """The test asks what no program can be asked."""


class Program:
    """The other side: functions that can be called by name."""

    def __init__(self, pid: int, max_bytes: int) -> None:
        self._received = bytearray()
        self._room = max_bytes
        self._read_seconds = read_seconds(max_bytes)
        self._poll, self._end = select.poll(), select.poll()
        self._poll.register(ANSWERS_FD, select.POLLIN)
        pidfd = os.pidfd_open(pid)
        for poll in (self._poll, self._end):
            poll.register(pidfd, select.POLLIN)
        self.calls = 0

    def load(self) -> None:
        """Wait until the program is there to be called. Raises ProgramEnded."""
        if self._line() + b"\n" != STARTED:
            os._exit(1)  # Never in good order: this says nothing about the program.
        _write("started")
        kind, *content = self._read()
        if kind != "loaded":
            raise ProgramEnded(_text(content))

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """Raises what the program raises, ProgramEnded, or ExamError for odd arguments."""
        try:
            line = json.dumps([name, encode(arguments), encode(keywords)])
        except (TypeError, ValueError, RecursionError) as error:
            raise ExamError(f"an argument is no plain data: {describe(error)}") from None
        self.calls += 1
        view = memoryview(line.encode() + b"\n")
        try:
            while view:
                view = view[os.write(CALLS_FD, view) :]
        except BrokenPipeError:
            pass  # It has ended, as reading will tell.
        return self._answer()

    def _answer(self) -> Any:
        kind, *content = self._read()
        if kind == "returned":
            return content[0]
        if kind != "raised":
            raise ProgramEnded(_text(content))
        told: Exception = ProgramError(_text(content))
        error = told
        known = getattr(builtins, str(content[0]), None)
        if isinstance(known, type) and issubclass(known, Exception):
            with contextlib.suppress(TypeError):  # UnicodeDecodeError wants more than a text.
                error = known(_text(content).partition(": ")[2])
        raise error from told

    def _read(self) -> list[Any]:
        """One line, its value decoded. The signal that ends a long reading cannot be caught."""
        line = self._line()
        signal.setitimer(signal.ITIMER_PROF, self._read_seconds)
        try:
            kind, *content = json.loads(line)
            if kind == "returned":
                content = [decode(content[0])]
        except (ValueError, TypeError, LookupError, RecursionError, ArithmeticError) as error:
            raise ProgramEnded(f"unreadable results: {type(error).__name__}") from None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        return [kind, *content]

    def _line(self) -> bytes:
        while (end := self._received.find(b"\n")) < 0:
            ready = {fd for fd, _ in self._poll.poll()}
            data = os.read(ANSWERS_FD, 1 << 16) if ANSWERS_FD in ready else b""
            if not data:
                # Its descriptors go before it does, and how it ended is for the worker to see.
                self._end.poll(1000)
                raise ProgramEnded("")
            self._received += data
            self._room -= len(data)
            if self._room < 0:
                raise Flood
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line


def _text(content: list[Any]) -> str:
    return str(content[-1])[:MAX_TEXT] if content else ""


def run_exam(exam: dict[str, Any], pid: int, max_bytes: int) -> NoReturn:
    """Examine the program of this process id, write lines to RESULT_FD and end."""
    program = Program(pid, max_bytes)
    try:
        program.load()
        if "check" in exam:
            _check(program, exam)
        else:
            _compare(program, exam)
        _write("done")
    except ProgramEnded as end:
        _write("ended", str(end)[:MAX_TEXT])
    except Flood:
        _write("flood")
    except ExamError as error:
        _write("broken", str(error)[:MAX_TEXT])
    except Exception as error:  # of comparing odd numbers
        _write("ended", describe(error))
    os._exit(0)


def _compare(program: Program, exam: dict[str, Any]) -> None:
    """Make each call; say what it returned or, if results are expected, whether it is that one."""
    relation = RELATIONS[exam["relation"]]
    expected = exam["expected"]
    for index, arguments in enumerate(exam["calls"]):
        try:
            output = program.call(exam["entry_point"], *decode(arguments))
        except Exception as error:
            _write("raised", _said(error))
            continue
        if expected is None:
            _write("returned", encode(output))
            continue
        wanted = decode(expected[index])
        # Data sets with JSON may have put a result in a list of one, without saying so.
        inner = exam["wrapped"] and relation(output, wanted[0])
        _write("judged", relation(output, wanted), inner)


def _said(error: Exception) -> str:
    """What the program itself said of an exception, if it raised it."""
    told = error.__cause__ or error
    return str(told) if isinstance(told, ProgramError) else describe(error)


def _check(program: Program, exam: dict[str, Any]) -> None:
    """Run the tests' own source, whose `check` (if it defines one) is called with the function.

    It sees `prefix`, with the function as the program has it in place of the one there.
    """

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        return program.call(exam["entry_point"], *arguments, **keywords)

    names: dict[str, Any] = {"__name__": "check"}
    try:
        exec(exam["prefix"], names)
        names |= {exam["entry_point"]: candidate, "candidate": candidate}
        exec(compile(exam["check"], "<check>", "exec", dont_inherit=True), names)
        if exam["calls_check"]:
            names["check"](candidate)
    except Exception as error:
        if not program.calls:
            raise ExamError(f"it fails before it calls the program: {describe(error)}") from None
        _write("judged", False, False, _said(error))
    else:
        if not program.calls:
            raise ExamError("it never calls the program")
        _write("judged", True, False)


def _write(*line: Any) -> None:
    view = memoryview(json.dumps(line).encode() + b"\n")
    while view:
        view = view[os.write(RESULT_FD, view) :]
