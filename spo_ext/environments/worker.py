"""Calls of an environment's code in processes of their own, bounded in time and in size.

The process runs this file by its path, so that it starts without PyTorch; nothing here imports more
than Python's own modules.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

MAX_REPLY = 4 << 20  # bytes of an answer
_MEMORY = 16 << 30  # bytes of address space
_START_S = 300.0  # for the imports of the user's module
_GRACE_S = 5.0  # after which the kernel ends a call that nobody waits for any more


class CallError(RuntimeError):
    """A call that raised, took too long, answered too much, or whose process died."""


def load(name: str) -> Any:
    """What "package.module:name" or "path/file.py:name" stands for.

    Raises ValueError if there is nothing, and whatever importing its module raises.
    """
    module, colon, attribute = name.rpartition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"must be path/file.py:name or package.module:name, got {name!r}")
    try:
        found = _from_file(Path(module)) if module.endswith(".py") else _import(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, FileNotFoundError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be loaded: {error}") from error
    except SystemExit as end:
        raise ValueError(f"{name!r} cannot be loaded: it calls sys.exit") from end
    return found


def make(name: str, arguments: Mapping[str, Any]) -> Any:
    """What `load` finds, called with the arguments if it is a class or a function.

    Raises ValueError, also for arguments that it does not take.
    """
    found = load(name)
    if not callable(found):
        if arguments:
            raise ValueError(f"arguments must be none, since {name} is no class or function")
        return found
    try:
        return found(**arguments)
    except TypeError as error:
        raise ValueError(f"{name} refuses the arguments {dict(arguments)}: {error}") from error


def _import(module: str) -> Any:
    return importlib.import_module(module)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    # As an import does: dataclasses and pickles look their module up.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


class Workers:
    """Processes that hold an object each, and call its methods.

    Args:
        name, arguments: of the object, as `make` has them; JSON.
        seconds: of a call; then its process is killed, with all that it started, and the next call
            has a new one.
        count: of processes, each started when it is first needed.

    Arguments and answers are JSON, an answer of at most MAX_REPLY bytes. What the code prints is
    left out.
    """

    def __init__(
        self, name: str, arguments: Mapping[str, Any], seconds: float, count: int = 2
    ) -> None:
        self._name, self._arguments, self._seconds = name, dict(arguments), seconds
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="spo-environment")
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for _ in range(count):
            self._idle.put(_Process())

    def map(self, method: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers in order; a CallError in the place of one that failed.

        Raises ValueError if the object cannot be made.
        """
        return list(self._threads.map(lambda given: self._call(method, given), calls))

    def _call(self, method: str, given: Sequence[Any]) -> Any:
        process = self._idle.get()
        try:
            if not process.alive:
                process.start(self._name, self._arguments)
            return process.ask([method, list(given), self._seconds], self._seconds)
        except CallError as error:
            return error
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().kill()


class _Process:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, name: str, arguments: Mapping[str, Any]) -> None:
        self.kill()
        code = f"import runpy; runpy.run_path({__file__!r})['serve']()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # killed as a group, and no Ctrl-C of the terminal
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        try:
            self.ask([name, dict(arguments), sys.path], _START_S)
        except CallError as error:
            self.kill()
            raise ValueError(f"{name} cannot be started: {error}") from None

    def ask(self, question: Any, seconds: float) -> Any:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(time.monotonic() + seconds, seconds)
        except OSError as error:
            self.kill()
            raise CallError(f"its process died: {error}") from None
        except CallError:
            self.kill()
            raise
        answer = json.loads(line)
        if "error" in answer:
            raise CallError(str(answer["error"]))
        return answer["value"]

    def _line(self, until: float, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe, found = self._process.stdout.fileno(), bytearray()
        while not found.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise CallError(f"it took more than {seconds:g} s")
            part = os.read(pipe, 1 << 16)
            if not part:
                raise CallError("its process died")
            found += part
            if len(found) > MAX_REPLY + 1000:
                raise CallError(f"it answered more than {MAX_REPLY} bytes")
        return bytes(found)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def serve() -> None:
    """Answers lines of JSON on the standard input: first [name, arguments, path] of an object, then
    [method, arguments, seconds] of its calls, by {"value": ...} or {"error": words}."""
    own = os.dup(1)
    os.dup2(2, 1)  # what the code prints, and what it starts
    sys.stdout = sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    thing: Any = None
    for number, line in enumerate(sys.stdin):
        first, given, last = json.loads(line)
        try:
            if number == 0:
                sys.path[:] = last
                thing = make(first, given)
                answer: Any = {"value": None}
            else:
                # The kernel's own action, which no code here can put off.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, last + _GRACE_S)
                answer = {"value": getattr(thing, first)(*given)}
                signal.setitimer(signal.ITIMER_REAL, 0)
            data = json.dumps(answer).encode()
            if len(data) > MAX_REPLY:
                raise ValueError(f"it answered {len(data)} bytes, more than {MAX_REPLY}")
        except BaseException as error:  # SystemExit too; whatever the code of a user raises
            words = f"{type(error).__name__}: {error}"[:1000]
            data = json.dumps({"error": words}).encode()
        left = memoryview(data + b"\n")
        while left:
            left = left[os.write(own, left) :]
