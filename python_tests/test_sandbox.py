"""The sandbox itself: retries, levels, ends and leaks of workers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from processes import alive, command_line, descendants, eventually
from sandbox_cases import (
    SQUARE,
    WHY_NOT,
    needs_bwrap,
    returned,
    run,
)
from test_sandbox_hostile import HOSTILE

from spo_ext.sandbox import (
    Limits,
    Program,
    Raised,
    Sandbox,
    SandboxError,
    StdinProgram,
    jobs,
    judge,
    worker_process,
)
from spo_ext.sandbox.launch import Launcher


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
    monkeypatch.setattr(worker_process, "GRACE_SECONDS", 2.0)
    monkeypatch.setattr(jobs, "STARVATION", 2)
    others = set(descendants(os.getpid()))
    with Sandbox(workers=1, level="bwrap", limits=Limits(wall_seconds=1.0)) as sandbox:
        run(sandbox, "def f(): pass")
        for pid in set(descendants(os.getpid())) - others:
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


@needs_bwrap
def test_a_worker_shares_nothing_with_another_at_the_same_time() -> None:
    source = """
    import os, time
    def f(i):
        open(f"/tmp/{i}", "w"); open(f"/dev/shm/{i}", "w")
        time.sleep(0.3)
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        inodes = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("ipc", "mnt", "net", "pid")]
        return os.listdir("/tmp"), os.listdir("/dev/shm"), len(pids), inodes
    """
    with Sandbox(workers=2, level="bwrap") as sandbox:
        programs = [Program(textwrap.dedent(source), calls=((i,),)) for i in range(4)]
        found = [outcome.outputs[0] for outcome in sandbox.run(programs)]
    for i, (tmp, shm, pids, _) in enumerate(found):  # type: ignore[misc]
        assert (tmp, shm, pids) == ([str(i)], [str(i)], 3)  # worker, program, examiner
    namespaces = [inode for *_, inodes in found for inode in inodes]  # type: ignore[misc]
    assert len(set(namespaces)) == 16


@needs_bwrap
def test_a_nursery_that_ended_is_replaced_and_one_is_not_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Sandbox(workers=1, level="bwrap") as sandbox:
        assert judge(sandbox, [SQUARE])[0].ok
        for pid in set(descendants(os.getpid())):
            if "bwrap" in command_line(pid):
                os.kill(pid, signal.SIGKILL)
        assert judge(sandbox, [SQUARE] * 3)[2].ok

    def no_fork(self: worker_process.Nursery, *_: object) -> int:
        raise SandboxError("no namespaces in a namespace")

    monkeypatch.setattr(worker_process.Nursery, "fork", no_fork)
    with Sandbox(workers=1, level="bwrap") as sandbox:
        assert judge(sandbox, [SQUARE])[0].ok
        assert run(sandbox, HOSTILE["endless loop"], 7).status == "timeout"


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
    assert eventually(lambda: not any(map(alive, below)))


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
