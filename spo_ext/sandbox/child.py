"""The freshly forked process that runs one program. From here on nothing can be trusted.

It holds no descriptor but stdin, stdout, stderr and its own pipes, and no expected output is in its
memory. So a program that patches this module, or writes results by hand, can do no more than state
outputs, which is what it was asked for.
"""

import atexit
import json
import math
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from spo_ext.sandbox.codec import STARTED, decode, describe, encode
from spo_ext.sandbox.prelude import RECURSION_LIMIT, compiled

RESULT_FD, CALLS_FD = 3, 4
LAST_FD = 256
STACK_BYTES = 120 << 20  # The kernel keeps 128 MiB free below the stack of any process.
# Beyond the memory that counts: what threads reserve for their stacks and never touch.
RESERVED_MIB = 2048

Limits = dict[str, Any]


def run_child(
    request: dict[str, Any],
    limits: Limits,
    config: dict[str, Any],
    descriptors: tuple[int, ...],
) -> NoReturn:
    """Confine this process, run the request in it and end it.

    `descriptors` become stdin, stdout, stderr, the pipe for results and, of functions, for calls.
    """
    confine(descriptors, limits, config)
    sys.setrecursionlimit(RECURSION_LIMIT)
    os.write(RESULT_FD, STARTED)
    if request["script"]:
        _run_script(request["source"])
    _serve_calls(request["source"])


def confine(descriptors: tuple[int, ...], limits: Limits, config: dict[str, Any]) -> None:
    """Keep stdin, stdout, stderr and the other descriptors, -1 for none; set the limits.

    Those that are none become a null device of this process alone.
    """
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    # Out of the way first, so that none overwrites another.
    wanted = [null if fd < 0 else fd for fd in descriptors]
    kept = [os.dup2(fd, LAST_FD + place) for place, fd in enumerate(wanted)]
    for place, fd in enumerate(kept):
        os.dup2(fd, place)
    os.closerange(len(kept), LAST_FD + len(kept))
    bounds = {
        resource.RLIMIT_AS: (limits["memory_mib"] + RESERVED_MIB) << 20,
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if config["private_user"]:
        # The kernel counts the processes of a user: the program's, the worker and the examiner.
        bounds[resource.RLIMIT_NPROC] = limits["processes"] + 2
    for name, bound in bounds.items():
        resource.setrlimit(name, (bound, bound))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK_BYTES if hard == resource.RLIM_INFINITY else min(hard, STACK_BYTES)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))
    # At the soft limit comes SIGXCPU, which tells a timeout from other kills.
    seconds = math.ceil(limits["cpu_seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _load(source: str, name: str) -> dict[str, Any]:
    """Run the source as a module; it is registered since dataclasses look their module up."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(compiled(source), module.__dict__)
    return module.__dict__


def _serve_calls(source: str) -> NoReturn:
    """Load the source, then answer calls until nobody asks: a line each, both ways."""
    code = 1
    try:
        names = _load(source, "program")
        _write_line(json.dumps(["loaded"]))
        with open(CALLS_FD, "rb", closefd=False) as calls:
            methods: dict[str, Callable[..., Any]] = {}
            for line in calls:
                _call(names, methods, json.loads(line))
        code = 0
    except BaseException as error:
        _report_failure(error)
    os._exit(code)


def _call(names: dict[str, Any], methods: dict[str, Callable[..., Any]], call: list[Any]) -> None:
    name, arguments, keywords = call
    try:
        function = methods.get(name) or methods.setdefault(name, _find(names, name))
        answer = ["returned", encode(function(*decode(arguments), **decode(keywords)))]
    except MemoryError:
        raise
    except BaseException as error:
        answer = ["raised", type(error).__name__, describe(error)]
    _write_line(json.dumps(answer))


def _find(names: dict[str, Any], name: str) -> Callable[..., Any]:
    """The function of this name, or the method of the class Solution, as some contests want it."""
    if name not in names and hasattr(names.get("Solution"), name):
        return getattr(names["Solution"](), name)  # type: ignore[no-any-return]
    return names[name]  # type: ignore[no-any-return]


def _run_script(source: str) -> NoReturn:
    """Run the source as a main program whose exit code counts."""
    code = 0
    try:
        _load(source, "__main__")
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
        _write_line(json.dumps(["failed", describe(error)]))


def _write_line(line: str) -> None:
    view = memoryview(line.encode() + b"\n")
    while view:
        view = view[os.write(RESULT_FD, view) :]
