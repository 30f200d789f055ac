"""The freshly forked process that runs one program. From here on nothing can be trusted.

It holds no descriptor but stdin, stdout, stderr and the result pipe, and no expected output was
ever sent into the sandbox. So a program that patches this module, or writes results by hand, can
do no more than state outputs, which is what it was asked for.
"""

import atexit
import json
import os
import resource
import sys
import types
from typing import Any, NoReturn

from spo_ext.sandbox.codec import STARTED, decode, encode

RESULT_FD = 3
LAST_FD = 256


def run_child(
    request: dict[str, Any], config: dict[str, Any], stdin: int, stdout: int, result: int
) -> NoReturn:
    """Confine this process, run the request in it and end it."""
    os.setsid()
    if request["stdin"] is None:
        stdin = os.open(os.devnull, os.O_RDONLY)
    else:
        os.pwrite(stdin, request["stdin"].encode(), 0)
        os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    os.dup2(result, RESULT_FD)
    os.closerange(RESULT_FD + 1, LAST_FD)
    _set_limits(config)
    os.write(RESULT_FD, STARTED)
    if request["stdin"] is None:
        _run_calls(request)
    _run_script(request)


def _set_limits(config: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: config["memory_mib"] << 20,
        resource.RLIMIT_FSIZE: config["file_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if config["private_user"]:
        # The kernel counts the processes of a user: the program's and this one's parent.
        limits[resource.RLIMIT_NPROC] = config["processes"] + 1
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))
    # At the soft limit comes SIGXCPU, which tells a timeout from other kills.
    resource.setrlimit(resource.RLIMIT_CPU, (config["cpu_seconds"], config["cpu_seconds"] + 1))


def _load(source: str, name: str) -> dict[str, Any]:
    """Run the source as a module; it is registered since dataclasses look their module up."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _run_calls(request: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        function = _load(request["source"], "program")[request["entry_point"]]
        for arguments in request["calls"]:
            _call(function, arguments)
        code = 0
    except BaseException as error:
        _report_failure(error)
    os._exit(code)


def _call(function: Any, arguments: list[Any]) -> None:
    """Write one line per call, so that the calls made before a timeout still count."""
    try:
        line = ["returned", encode(function(*decode(arguments)))]
    except MemoryError:
        raise
    except BaseException as error:
        line = ["raised", _describe(error)]
    _write_line(json.dumps(line))


def _run_script(request: dict[str, Any]) -> NoReturn:
    """Run the source as a main program whose exit code counts."""
    code = 0
    try:
        _load(request["source"], "__main__")
    except SystemExit as stop:
        code = stop.code & 0xFF if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        code = 1
        _report_failure(error)
    _end_like_python()
    os._exit(code)


def _end_like_python() -> None:
    """What a script may rely on at its end, without the costly rest: it may print as late as this.

    Threads are joined, exit hooks run, files that the script left open are flushed.
    """
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    sys.modules["__main__"].__dict__.clear()
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None:
            stream.flush()


def _report_failure(error: BaseException) -> None:
    if isinstance(error, MemoryError):
        # There may be no room left to build a line in.
        os.write(RESULT_FD, b'["failed", "MemoryError"]\n')
    else:
        _write_line(json.dumps(["failed", _describe(error)]))


def _describe(error: BaseException) -> str:
    """Name and text of an exception, whose __str__ may itself raise."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return type(error).__name__


def _write_line(line: str) -> None:
    view = memoryview(line.encode() + b"\n")
    while view:
        view = view[os.write(RESULT_FD, view) :]
