"""What a program can see and leave behind: files, secrets, the network, processes."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import eventually
from sandbox_cases import (
    SQUARE,
    WHY_NOT,
    needs_bwrap,
    only_workers_left,
    paid,
    returned,
    run,
)

from spo_ext.sandbox import (
    Limits,
    Program,
    Raised,
    Sandbox,
    StdinProgram,
    Submission,
    judge,
    worker_process,
)

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
            with open(tempfile.mktemp(suffix="-breach"), "wb") as file:
                file.write(bytes(1 << 20))
        except OSError:
            full += 1
    return written
"""


def test_files_cannot_be_written_outside_tmp(sandbox: Sandbox, tmp_path: Path) -> None:
    prefix = os.path.dirname(os.path.realpath(sys.executable))
    folders = [str(tmp_path), os.getcwd(), str(Path.home()), prefix]
    folders += ["/", "/etc", "/usr/lib", "/dev"]
    outcome = run(sandbox, WRITER, folders)
    written = outcome.outputs[0]
    # Inside it has a /tmp of its own, where all may be written; the host's is looked at below.
    assert isinstance(written, list) and all(path.startswith("/tmp/") for path in written), outcome
    for folder in folders:
        assert not (Path(folder) / "breach").exists() and not (Path(folder) / "deep").exists()
    assert not list(Path("/tmp").glob("*-breach"))
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
            name = StdinProgram(f"open('/tmp/sesame-{secret}', 'w')", ("",))
            assert sandbox.run([name])[0].status == "ok"
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
        # Worker, program, examiner, and this program's daemon: none of an earlier run.
        assert run(sandbox, source, 7).outputs == (4,)
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


CHANNELS = {
    "an attribute of stdin": (
        "os.setxattr(0, 'user.k', b'x')",
        "bytes(os.getxattr(0, 'user.k'))",
    ),
    "text behind the end of stdin": ("os.pwrite(0, b'x' * 99, 50)", "os.pread(0, 99, 1)[:1]"),
    "a lock on stdin": (
        "fcntl.flock(0, fcntl.LOCK_EX)",
        "fcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    ),
    "a signal of stdin": ("fcntl.fcntl(0, 10, 34)", "fcntl.fcntl(0, 11)"),
    "a file": ("open('/tmp/x', 'w').write('x')", "os.listdir('/tmp')"),
    "folders": (
        "[os.makedirs('/tmp/d/e'), os.symlink('/', '/tmp/d/e/root'), os.chmod('/tmp/d', 0)]",
        "os.listdir('/tmp')",
    ),
    "many files": ("[open(f'/tmp/{i}', 'w').close() for i in range(300)]", "os.listdir('/tmp')"),
    "a file in shared memory": ("open('/dev/shm/x', 'w').write('x')", "os.listdir('/dev/shm')"),
    "the age of /tmp": ("os.utime('/tmp', (7, 7))", "int(os.stat('/tmp').st_mtime) == 7"),
    "the mode of /tmp": ("os.chmod('/tmp', 0o700)", "os.stat('/tmp').st_mode & 0o7777 == 0o700"),
}
SEEN = "try: print({look})\nexcept (OSError, ValueError): print('nothing')"


@needs_bwrap
@pytest.mark.parametrize("name", CHANNELS)
def test_no_state_passes_from_one_program_to_the_next(name: str) -> None:
    leave, look = CHANNELS[name]
    left = f"import fcntl, os\ntry: {leave}\nexcept OSError: pass\nprint(1)"
    seen = "import fcntl, os\n" + SEEN.format(look=look)
    with Sandbox(workers=1, level="bwrap") as sandbox:
        fresh = sandbox.run([StdinProgram(seen, ("",))])[0].outputs
        worker = sandbox.worker_pids()
        assert sandbox.run([StdinProgram(left, ("hidden",))])[0].outputs == ("1\n",)
        assert sandbox.run([StdinProgram(seen, ("",))])[0].outputs == fresh
        assert sandbox.worker_pids() == worker, "a new worker shows nothing"


@pytest.mark.parametrize(
    "call",
    [
        "a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1]))])",
        "a.bind('\\0name')",
        "a.connect('\\0name')",
    ],
)
def test_nothing_stays_in_sockets(sandbox: Sandbox, call: str) -> None:
    source = f"""
    import array, socket
    def f():
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        {call}
    """
    output = run(sandbox, source).outputs[0]
    assert isinstance(output, Raised) and "PermissionError" in output.text


def test_what_a_program_says_of_itself_is_short(sandbox: Sandbox) -> None:
    for kind in ('["failed", "%s"]', '["raised", "E", "%s"]', '["raised", "%s"]'):
        write = f"import os\nos.write(3, b'{kind}\\n'.replace(b'%s', b'A' * 900_000))\nos._exit(1)"
        for program in (Program(write, calls=((),)), StdinProgram(write, ("",))):
            outcome = sandbox.run([program])[0]
            assert outcome.status != "ok" and len(outcome.reason) <= 300
            assert all(isinstance(x, Raised) and len(x.text) <= 400 for x in outcome.outputs)
