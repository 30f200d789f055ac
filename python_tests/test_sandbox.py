"""The sandbox: right programs are paid, wrong ones are not, hostile ones harm nobody.

A hostile program returns the expected output if its attack succeeds, so a breach shows as a paid
program; what it tried on this machine is looked up besides.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spo_ext.sandbox import (
    Limits,
    Outcome,
    Program,
    Raised,
    Sandbox,
    SandboxError,
    StdinProgram,
    Submission,
    judge,
    probe_levels,
    worker_process,
)
from spo_ext.sandbox.launch import Launcher

WHY_NOT = probe_levels()
needs_bwrap = pytest.mark.skipif(
    WHY_NOT["bwrap"] is not None, reason=f"bubblewrap does not work here: {WHY_NOT['bwrap']}"
)
FAST = Limits(wall_seconds=1.5, memory_mib=128)
SQUARE = Submission(Program("def f(x): return x * x", calls=((3,), (-4,))), (9, 16))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if WHY_NOT["bwrap"] is not None:
        pytest.skip(f"bubblewrap does not work here: {WHY_NOT['bwrap']}")
    with Sandbox(workers=2, level="bwrap", limits=FAST) as sandbox:
        yield sandbox


def run(sandbox: Sandbox, source: str, *arguments: object) -> Outcome:
    """Run f(*arguments) once."""
    return sandbox.run([Program(textwrap.dedent(source), calls=(arguments,))])[0]


def returned(sandbox: Sandbox, expression: str) -> object:
    return run(sandbox, f"def f(): return {expression}").outputs[0]


def paid(sandbox: Sandbox, source: str, expected: object, *arguments: object) -> bool:
    program = Program(textwrap.dedent(source), calls=(arguments,))
    return judge(sandbox, [Submission(program, (expected,))])[0].ok


def descendants(root: int) -> list[int]:
    """Process ids below `root`, as this machine sees them."""
    parent_of = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parent_of[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parent_of.items() if parent == pid]
    return found[1:]


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def only_workers_left(sandbox: Sandbox) -> bool:
    """Whether the machine runs no process of the sandbox but idle workers."""
    return all(len(descendants(outer)) <= 1 for outer in sandbox.worker_pids())


# --- programs in good faith ---


@pytest.mark.parametrize(
    ("source", "passed", "reason"),
    [
        ("def f(x): return x * x", 2, ""),
        ("def f(x): return x + 6", 1, "call 1: wrong output"),
        ("def f(x): return 0", 0, "call 0: wrong output"),
        ("def f(x): return 9 if x == 3 else 1 // 0", 1, "call 1: ZeroDivisionError"),
        ("def f(x) return x", 0, "SyntaxError"),
        ("def g(x): return x * x", 0, "KeyError: 'f'"),
        ("import nothing_like_this\ndef f(x): return x * x", 0, "ModuleNotFoundError"),
        ("1 / 0", 0, "ZeroDivisionError"),
        ("def f(x):\n    print('noise'); return x * x", 2, ""),
    ],
)
def test_verdict(sandbox: Sandbox, source: str, passed: int, reason: str) -> None:
    verdict = judge(sandbox, [Submission(Program(source, calls=((3,), (-4,))), (9, 16))])[0]
    assert (verdict.passed, verdict.total, verdict.ok) == (passed, 2, passed == 2)
    assert reason in verdict.reason if reason else verdict.reason == ""


VALUES = [
    None, True, 1, 1.0, -0.5, math.inf, "a\u00e9\ud800\0\n", b"\xff", 2**70, -(10**6000), [1, [2]],
    (1, (2,)), {"a": {1: (2,)}}, {1, 2}, frozenset({1}), [], (), {}, "1", [True], [1.0], {True: 1},
    {(1, 2): 1}, {1: True},
]  # fmt: skip


def test_every_value_agrees_with_itself_only(sandbox: Sandbox) -> None:
    """Also across types that Python calls equal: True, 1 and 1.0 are three values here."""
    source = "def f(x): return x"
    pairs = [(value, expected) for value in VALUES for expected in VALUES]
    verdicts = judge(sandbox, [Submission(Program(source, calls=((v,),)), (e,)) for v, e in pairs])
    agreeing = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.ok]
    assert agreeing == [(value, value) for value in VALUES]


def test_nan_agrees_with_nan_only(sandbox: Sandbox) -> None:
    assert paid(sandbox, "def f(): return [float('nan')]", [math.nan])
    assert not paid(sandbox, "def f(): return float('nan')", 1.0)
    assert not paid(sandbox, "def f(): return 1.0", math.nan)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("(i for i in range(3))", "generator is not plain data"),
        ("type('I', (int,), {})(7)", "I is not plain data"),
        ("type('int', (int,), {})(7)", "int is not plain data"),
        ("[[x := []], x.append(x)] and x", "nested deeper"),
        ("eval('[' * 80 + ']' * 80)", "nested deeper"),
        ("f", "function is not plain data"),
        ("{'a': object()}", "object is not plain data"),
    ],
)
def test_only_plain_data_comes_back(sandbox: Sandbox, expression: str, text: str) -> None:
    output = returned(sandbox, expression)
    assert isinstance(output, Raised) and text in output.text


def test_keys_made_to_collide_do_not_stall_the_judge(sandbox: Sandbox) -> None:
    start = time.monotonic()
    output = returned(sandbox, "{i * (2**61 - 1): 0 for i in range(2000)}")
    assert isinstance(output, Raised) and time.monotonic() - start < 5


def test_calls_before_a_timeout_count(sandbox: Sandbox) -> None:
    source = "def f(x):\n    while x == 2: pass\n    return x"
    verdict = judge(sandbox, [Submission(Program(source, calls=((1,), (2,), (3,))), (1, 2, 3))])[0]
    assert (verdict.passed, verdict.ok) == (1, False)
    assert "CPU time" in verdict.reason or "longer" in verdict.reason


def test_scripts_read_stdin_and_print(sandbox: Sandbox) -> None:
    twice = StdinProgram("print(2 * int(input()))", ("1\n", "21", "x"))
    outcome = sandbox.run([twice])[0]
    assert outcome.outputs[:2] == ("2\n", "42\n")
    assert outcome.status == "error" and "invalid literal" in outcome.reason
    verdict = judge(sandbox, [Submission(twice, ("2", "41", "2"))])[0]
    assert (verdict.passed, verdict.ok) == (1, False)


@pytest.mark.parametrize(
    "source",
    [
        "import sys; print(sys.stdin.read().upper(), end=''); sys.exit()",
        "import os, sys; os.write(1, os.read(0, 1 << 20).upper()); os._exit(0)",
        "data = open(0).read()\nif __name__ == '__main__': print(data.upper())",
        "import atexit; atexit.register(lambda: print(open(0).read().upper()))",
        "out = open(1, 'w'); out.write(open(0).read().upper())",
        "import threading; threading.Thread(target=lambda: print(input().upper())).start()",
    ],
)
def test_ways_to_write_a_script(sandbox: Sandbox, source: str) -> None:
    text = "word " * 40_000  # More than a pipe holds.
    assert judge(sandbox, [Submission(StdinProgram(source, (text,)), (text.upper(),))])[0].ok


def test_a_failing_script_is_not_paid_for_what_it_printed(sandbox: Sandbox) -> None:
    for ending in ("sys.exit(3)", "raise ValueError", "os._exit(1)", "os.abort()"):
        script = StdinProgram(f"import os, sys; print(7, flush=True); {ending}", ("",))
        assert not judge(sandbox, [Submission(script, ("7",))])[0].ok, ending


def test_order_is_kept(sandbox: Sandbox) -> None:
    source = "import time\ndef f(i, s): time.sleep(s); return i"
    programs = [Program(source, calls=((i, 0.05 * (i % 7 == 0)),)) for i in range(80)]
    assert [outcome.outputs for outcome in sandbox.run(programs)] == [(i,) for i in range(80)]
    assert sandbox.run([]) == []


def test_wrong_use_is_an_error_of_the_caller(sandbox: Sandbox) -> None:
    with pytest.raises(TypeError, match="object is not plain data"):
        run(sandbox, "def f(x): return x", object())
    with pytest.raises(TypeError, match="expected output must be plain data"):
        judge(sandbox, [Submission(SQUARE.program, (9, object()))])
    with pytest.raises(ValueError, match="one output per call"):
        Submission(SQUARE.program, (9,))
    with pytest.raises(ValueError, match="surrogates"):
        sandbox.run([StdinProgram("", ("\ud800",))])
    with pytest.raises(ValueError, match="cpu_seconds must be positive"):
        Limits(cpu_seconds=0)
    with pytest.raises(ValueError, match="workers"):
        Sandbox(workers=0)
    assert judge(sandbox, [SQUARE])[0].ok


# --- programs in bad faith: each f() returns its argument if it gets its way ---

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
        def f(reward): return Number(7)
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
            header = {"end": "exit", "wait_status": 0, "seconds": 0, "dirty": False,
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


WRITER = """
import os, tempfile
def f(folders):
    written = []
    for folder in folders:
        for path in (os.path.join(folder, "breach"), os.path.join(folder, "deep", "breach")):
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                open(path, "w").write("x")
                written.append(path)
            except OSError:
                pass
    full = 0
    while full < 3:  # A full /tmp harms this program only.
        try:
            with open(tempfile.mktemp(), "wb") as file:
                file.write(bytes(1 << 20))
        except OSError:
            full += 1
    return written
"""


def test_files_cannot_be_written_outside_tmp(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp = Path(os.path.realpath("/tmp"))
    before = set(tmp.iterdir())
    prefix = os.path.dirname(os.path.realpath(sys.executable))
    folders = [str(tmp_path), os.getcwd(), str(Path.home()), prefix]
    folders += ["/", "/etc", "/usr/lib", "/dev"]
    outcome = run(sandbox, WRITER, folders)
    written = outcome.outputs[0]
    # Inside it has a /tmp of its own, where all may be written; the host's is looked at below.
    assert isinstance(written, list) and all(path.startswith("/tmp/") for path in written), outcome
    for folder in folders:
        assert not (Path(folder) / "breach").exists() and not (Path(folder) / "deep").exists()
    assert set(tmp.iterdir()) <= before
    assert judge(sandbox, [SQUARE])[0].ok


def test_nothing_is_left_in_tmp_for_the_next_program() -> None:
    if WHY_NOT["bwrap"] is not None:
        pytest.skip(f"bubblewrap does not work here: {WHY_NOT['bwrap']}")
    leave = "import os\ndef f(): open('/tmp/note', 'w').write('42'); os.mkdir('/tmp/d', 0)"
    with Sandbox(workers=1, level="bwrap") as sandbox:
        assert run(sandbox, leave).outputs == (None,)
        assert returned(sandbox, "__import__('os').listdir('/tmp')") == []


# Looks for a word where a program can look: frames, objects, files, processes, raw memory.
SEARCH = """
import ctypes, gc, os, sys
def strings():
    frame = sys._getframe(1)
    while frame:
        yield from [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for thing in gc.get_objects():
        if type(thing) is dict: yield from [*thing.values()]
        elif type(thing) in (list, tuple): yield from thing
def files():
    system = ("/proc/sys", "/usr/lib", "/lib", "/dev", sys.base_prefix + "/lib")
    for folder, _, names in os.walk("/", onerror=lambda _: None):
        if folder.startswith(system) or "/fd" in folder or "/task" in folder: continue
        for name in names:
            if name.startswith("k"): continue  # The kernel's own in /proc, some of which block.
            try: yield open(os.path.join(folder, name), "rb").read(1 << 18)
            except OSError: pass
def memory():
    libc, (out, into) = ctypes.CDLL(None), os.pipe()
    for line in open("/proc/self/maps").readlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if line.split()[1].startswith("rw"):
            for place in range(start, end, 60_000):  # By a system call, lest a gap is fatal.
                size = libc.write(into, ctypes.c_void_p(place), min(65_536, end - place))
                if size > 0: yield os.read(out, size)
def look_everywhere():
    for thing in strings():
        if type(thing) is str: yield thing.encode(errors="replace")
        elif type(thing) is bytes: yield thing
    yield repr([os.environ, sys.argv, sys.path, os.uname()]).encode()
    yield from files()
    yield from memory()
def f(head, tail, *_):
    word = head.encode() + tail.encode()  # Joined here: the request does not hold it.
    found = set()
    for text in look_everywhere():
        start = text.find(word)
        while start >= 0:
            letters = text[start + len(word) : start + len(word) + 16]
            if letters.isalnum() and len(letters) == 16: found.add(letters.decode())
            start = text.find(word, start + 1)
    return sorted(found)
"""
PATIENT = Limits(cpu_seconds=10, wall_seconds=20.0, memory_mib=512)


@needs_bwrap
def test_expected_outputs_cannot_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex(8)
    (tmp_path / "answers.txt").write_text(f"sesame-{secret}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANSWER", f"sesame-{secret}")
    marker = subprocess.Popen(["sleep", "60", f"sesame-{secret}"], stderr=subprocess.DEVNULL)
    try:
        with Sandbox(workers=1, level="bwrap", limits=PATIENT) as sandbox:
            # The control shows that the search works: told the secret, it finds it.
            told = run(sandbox, SEARCH, "sesa", "me-", f"sesame-{secret}")
            assert told.outputs == ([secret],), told
            program = Program(SEARCH, calls=(("sesa", "me-"),))
            submission = Submission(program, ([secret], f"sesame-{secret}")[:1])
            assert sandbox.run([program])[0].outputs == ([],)
            assert not judge(sandbox, [submission])[0].ok
            assert judge(sandbox, [SQUARE])[0].ok
    finally:
        marker.kill()
        marker.wait()


@needs_bwrap
def test_nothing_of_the_program_before_can_be_found() -> None:
    """Not its source, arguments, results, or printed text: it may have been a right answer."""
    secret = secrets.token_hex(8)
    # Longer than the search, which would overwrite it otherwise.
    before = f"{'#' * 9999}\ndef f(x): print(x); return 'sesame-{secret}', x"
    with Sandbox(workers=1, level="bwrap", limits=PATIENT) as sandbox:
        for _ in range(3):
            answer = run(sandbox, before, f"sesame-{secret}")
            assert answer.outputs == ((f"sesame-{secret}",) * 2,)
            script = StdinProgram("print(input())", (f"sesame-{secret}",))
            assert sandbox.run([script])[0].outputs == (f"sesame-{secret}\n",)
        assert run(sandbox, SEARCH, "sesa", "me-").outputs == ([],)


def test_only_python_itself_is_visible(sandbox: Sandbox) -> None:
    look = "import os\ndef f(path): return os.listdir(path) if os.path.exists(path) else []"
    files = [Path(file).parent for file in (__file__, worker_process.__file__, pytest.__file__)]
    # The interpreter may live in a home directory: then the way to it is there, nothing else.
    prefix = Path(os.path.realpath(sys.base_prefix))
    way = {path.name for path in (prefix, *prefix.parents)}
    packages = Path("/lib/python3/dist-packages")
    for folder in (*files, packages, Path.cwd(), Path.home()):
        seen = run(sandbox, look, str(folder)).outputs[0]
        assert isinstance(seen, list) and set(seen) <= way, folder


CONNECT = """
import ctypes, os, socket
def f(port):
    for host in ("127.0.0.1", "::1"):
        try:
            socket.create_connection((host, port), timeout=1).send(b"hello")
            return True
        except OSError: pass
    libc = ctypes.CDLL(None)
    fd = libc.socket(2, 1, 0)
    name = (2).to_bytes(2, "little") + port.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
    return fd >= 0 and libc.connect(fd, name, 16) == 0
"""


def test_network_is_out_of_reach(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert not paid(sandbox, CONNECT, True, port)
        assert run(sandbox, CONNECT, port).outputs == (False,)
        with pytest.raises(TimeoutError):
            server.accept()
    assert judge(sandbox, [SQUARE])[0].ok


@needs_bwrap
def test_namespaces_alone_keep_the_network_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system-call filter hides whether the namespace holds, so this looks without it."""
    monkeypatch.setattr("spo_ext.sandbox.launch.build_filter", lambda: b"")
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox(1, level="bwrap") as sandbox:
        assert "WITHOUT" in sandbox.describe()
        assert run(sandbox, CONNECT, server.getsockname()[1]).outputs == (False,)
        assert returned(sandbox, "bool(__import__('socket').socket())") is True


def test_a_daemon_does_not_survive(sandbox: Sandbox) -> None:
    source = """
    import os, time
    def f(reward):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 64)
                time.sleep(60)
            os._exit(0)
        os.wait()
        return len([name for name in os.listdir("/proc") if name.isdigit()])
    """
    for _ in range(4):
        # Worker, program, and this program's daemon: none of an earlier run.
        assert run(sandbox, source, 7).outputs == (3,)
    assert eventually(lambda: only_workers_left(sandbox))


def test_the_worker_cannot_be_tampered_with(sandbox: Sandbox) -> None:
    """Each of these, had it worked, would change how later programs fare."""
    for attack in (
        "__import__('resource').prlimit(1, 7, (1, 1))",
        "__import__('os').sched_setaffinity(1, [0])",
        "__import__('os').setpriority(0, 1, 19)",
        "open('/proc/1/mem', 'r+b')",
        "open('/proc/1/oom_score_adj', 'w')",
        "__import__('os').listdir('/proc/1/fd')",
        "__import__('os').memfd_create('x')",
        "__import__('os').chroot('/tmp')",
    ):
        output = returned(sandbox, attack)
        assert isinstance(output, Raised) and "PermissionError" in output.text, (attack, output)
    assert isinstance(returned(sandbox, "__import__('os').setuid(0)"), Raised)
    libc_calls = {"ptrace": (16, 1, 0, 0), "unshare": (0x10000000,), "shmget": (0, 4096, 0o1600)}
    for name, arguments in libc_calls.items():
        call = f"__import__('ctypes').CDLL(None).{name}{arguments}"
        assert returned(sandbox, call) == -1, name


# --- the sandbox itself ---


@needs_bwrap
def test_a_killed_worker_is_replaced_and_its_program_retried() -> None:
    source = "import time\ndef f(i): time.sleep(0.4); return i"
    with Sandbox(workers=2, level="bwrap") as sandbox:
        run(sandbox, "def f(): pass")

        def kill_workers() -> None:
            for pid in sandbox.worker_pids():
                os.kill(pid, signal.SIGKILL)

        killer = threading.Timer(0.5, kill_workers)
        killer.start()
        outcomes = sandbox.run([Program(source, calls=((i,),)) for i in range(6)])
        killer.join()
        assert [outcome.outputs for outcome in outcomes] == [(i,) for i in range(6)]
        kill_workers()  # Also while idle.
        assert judge(sandbox, [SQUARE] * 4) == judge(sandbox, [SQUARE] * 4)


@needs_bwrap
def test_a_hanging_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_SECONDS", 1.0)
    with Sandbox(workers=1, level="bwrap", limits=Limits(wall_seconds=1.0)) as sandbox:
        run(sandbox, "def f(): pass")
        for pid in descendants(os.getpid()):
            os.kill(pid, signal.SIGSTOP)
        big = "x" * 1_000_000  # More than the pipe holds: sending must not block either.
        assert run(sandbox, "def f(x): return len(x)", big).outputs == (1_000_000,)


@needs_bwrap
def test_a_failing_sandbox_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(workers=1, level="bwrap") as sandbox:
        monkeypatch.setattr(Launcher, "command", lambda *_: ["/bin/sh", "-c", "echo broken >&2"])
        with pytest.raises(SandboxError, match="broken"):
            sandbox.run([SQUARE.program])
        monkeypatch.setattr(Launcher, "command", lambda *_: ["/nonexistent"])
        with pytest.raises(SandboxError, match="cannot start"):
            sandbox.run([SQUARE.program])
        monkeypatch.undo()
        assert judge(sandbox, [SQUARE])[0].ok
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run([SQUARE.program])


def test_running_without_isolation_needs_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPO_ALLOW_UNSANDBOXED", raising=False)
    with pytest.raises(SandboxError, match="allow_unsandboxed=True"):
        Sandbox(level="rlimits")
    monkeypatch.setattr(Launcher, "missing", lambda self: "" if self.level == "rlimits" else "gone")
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        Sandbox()
    monkeypatch.setenv("SPO_ALLOW_UNSANDBOXED", "1")
    with Sandbox(workers=1) as sandbox:
        assert sandbox.level == "rlimits" and "NO isolation" in sandbox.describe()


@pytest.mark.parametrize("level", ["unshare", "rlimits"])
def test_weaker_levels(level: str) -> None:
    if WHY_NOT[level] is not None:  # type: ignore[index]
        pytest.skip(f"{level} does not work here: {WHY_NOT[level]}")  # type: ignore[index]
    killer = """
    import os, signal
    def f(reward):
        if os.getppid() != 1: os.kill(os.getppid(), signal.SIGKILL)
        return 0
    """
    with Sandbox(workers=1, level=level, allow_unsandboxed=True) as sandbox:  # type: ignore[arg-type]
        assert sandbox.level == level
        scripts = StdinProgram("print(input())", ("a", "b"))
        assert sandbox.run([scripts])[0].outputs == ("a\n", "b\n")
        assert run(sandbox, HOSTILE["endless loop"], 7).status == "timeout"
        assert run(sandbox, HOSTILE["memory bomb"], 7).status == "memory"
        assert run(sandbox, killer, 7).status == ("ok" if level == "unshare" else "crashed")
        daemon = "import os, time\ndef f():\n    if os.fork() == 0: os.setsid(); time.sleep(60)"
        assert run(sandbox, daemon).outputs == (None,)
        assert isinstance(returned(sandbox, "__import__('socket').socket()"), Raised)
        assert judge(sandbox, [SQUARE])[0].ok
        workers = set(sandbox.worker_pids())
    assert eventually(lambda: not workers & set(descendants(os.getpid())))


OWNER = """
import sys, time, types
sys.modules["spo_ext"] = types.ModuleType("spo_ext")  # Not the package itself: it loads torch.
sys.modules["spo_ext"].__path__ = [sys.argv[2]]
from spo_ext.sandbox import Program, Sandbox
sandbox = Sandbox(workers=2, level="bwrap")
sandbox.run([Program("def f(): return 1", calls=((),))] * 4)
print("ready", flush=True)
if sys.argv[1] == "run":
    sandbox.run([Program("import time\\ndef f(): time.sleep(60)", calls=((),))] * 50)
elif sys.argv[1] == "wait":
    time.sleep(60)
"""


@needs_bwrap
@pytest.mark.parametrize("state", ["run", "wait", "exit"])
def test_workers_end_with_their_owner(state: str) -> None:
    """Also if it is killed, and if it ends without closing the sandbox."""
    package = Path(worker_process.__file__).parents[1]
    command = [sys.executable, "-c", OWNER, state, str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        if state != "exit":
            time.sleep(0.3)
            below = descendants(owner.pid)
            assert len(below) >= 2
            owner.kill()
        else:
            below = descendants(owner.pid)
        owner.wait()
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


@needs_bwrap
def test_no_descriptor_or_process_is_leaked() -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    below, descriptors = set(descendants(os.getpid())), open_descriptors()
    for _ in range(3):
        with Sandbox(workers=2, level="bwrap") as sandbox:
            sandbox.run([Program(HOSTILE["exit inside the call"], calls=((7,),)), SQUARE.program])
            for pid in sandbox.worker_pids():
                os.kill(pid, signal.SIGKILL)
            judge(sandbox, [SQUARE] * 3)
    assert open_descriptors() == descriptors
    assert eventually(lambda: set(descendants(os.getpid())) <= below)


def test_missing_tool_is_named() -> None:
    assert shutil.which("bwrap") or "bwrap not found" in str(WHY_NOT["bwrap"])
