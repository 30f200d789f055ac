"""Programs in bad faith: each f() returns its argument, the expected output, if it gets its way."""

from __future__ import annotations

import textwrap
import time

import pytest
from processes import eventually
from sandbox_cases import (
    SQUARE,
    only_workers_left,
)

from spo_ext.sandbox import (
    Program,
    Sandbox,
    Submission,
    judge,
)

HOSTILE = {
    "fork bomb": """
        import os
        def f(reward):
            while True:
                try: os.fork()
                except OSError: pass
    """,
    "memory bomb": """
        def f(reward):
            hoard = []
            while True: hoard.append(bytearray(1 << 20))
    """,
    "hoard of address space": """
        import mmap
        def f(reward):
            hoard = [mmap.mmap(-1, 1 << 28) for _ in range(16)]
            return reward
    """,
    "memory bomb of many processes": """
        import os, time
        def f(reward):
            for _ in range(3): os.fork()
            hoard = bytearray(b"x") * (100 << 20)
            time.sleep(60)
    """,
    "endless loop": "def f(reward):\n    while True: pass",
    "sleep": "import time\ndef f(reward): time.sleep(60)",
    "output flood": """
        import os
        def f(reward):
            while True: os.write(1, b"x" * 65536)
    """,
    "result flood": "def f(reward): return 'x' * (64 << 20)",
    "exit before the tests": "import os\nos._exit(0)",
    "polite exit before the tests": "import sys\nsys.exit(0)\ndef f(reward): return reward",
    "exit inside the call": "import os\ndef f(reward): os._exit(0)",
    "kill the parent": """
        import os, signal
        def f(reward):
            for pid in {1, os.getppid()}:
                for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT):
                    os.kill(pid, number)
            try: os.kill(-1, signal.SIGKILL)
            except ProcessLookupError: pass
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "segfault": "import ctypes\ndef f(reward): ctypes.string_at(0)",
    "lying equality": """
        class Liar:
            def __eq__(self, other): return True
            def __hash__(self): return 0
        class Number(int):
            __eq__ = Liar.__eq__
            __hash__ = Liar.__hash__
        def f(reward): return Number(6)
    """,
    "patch everything": """
        import builtins, gc, json, sys, types
        def yes(*_, **__): return '["returned", true]'
        def f(reward):
            frame = sys._getframe()
            while frame:
                for name in list(frame.f_globals):
                    if isinstance(frame.f_globals[name], types.FunctionType):
                        frame.f_globals[name] = yes
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, types.FunctionType) and thing is not yes:
                    try: thing.__code__ = yes.__code__
                    except ValueError: pass
            json.dumps = json.loads = builtins.type = builtins.isinstance = yes
            sys.modules.clear()
            return True
    """,
    "forged frames": """
        import json, os, struct
        def f(reward):
            lines = b'["returned", true]\\n' * 3
            header = {"end": "exit", "program_status": 0, "exam_status": 0, "seconds": 0,
                      "dirty": False,
                      "result_bytes": len(lines), "stdout_bytes": 0}
            body = json.dumps(header).encode()
            forged = struct.pack("!I", len(body)) + body + lines
            for fd in range(256):
                try: os.write(fd, forged)
                except OSError: pass
            for process in os.listdir("/proc"):
                for fd in range(16):
                    try: os.write(os.open(f"/proc/{process}/fd/{fd}", os.O_WRONLY), forged)
                    except OSError: pass
            os._exit(0)
    """,
}
# What may be said of them; any other status means that something else stopped the program.
STATUS = {
    "fork bomb": {"timeout", "error", "memory"},
    "memory bomb": {"memory"},
    "hoard of address space": {"ok"},  # mmap raises OSError.
    "memory bomb of many processes": {"memory"},
    "endless loop": {"timeout"},
    "sleep": {"timeout"},
    "output flood": {"output"},
    "result flood": {"output", "memory"},
    "kill the parent": {"crashed"},
    "segfault": {"crashed"},
    "lying equality": {"ok"},
    "patch everything": {"ok", "error", "crashed"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program(sandbox: Sandbox, name: str) -> None:
    program = Program(textwrap.dedent(HOSTILE[name]), calls=((7,),))
    start = time.monotonic()
    verdict = judge(sandbox, [Submission(program, (7,)), SQUARE])
    assert not verdict[0].ok and verdict[0].passed == 0
    assert verdict[1].ok, "the program beside it suffered"
    assert time.monotonic() - start < 15
    assert judge(sandbox, [SQUARE] * 4) == [verdict[1]] * 4, "the next programs suffered"
    assert eventually(lambda: only_workers_left(sandbox)), "a process survived"
    assert sandbox.run([program])[0].status in STATUS.get(name, {"error"})
