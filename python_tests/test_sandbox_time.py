"""What time costs: CPU time judges, sleepers share, what ends at once costs next to nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from sandbox_cases import SQUARE, needs_bwrap, run

from spo_ext.sandbox import Limits, Program, Sandbox, StdinProgram, Submission, judge, pool

BURN = """
import time
def f(seconds):
    while time.process_time() < seconds: pass
    return seconds
"""


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Sixteen other processes want the cores."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(16)]
    yield
    for other in others:
        other.kill()
        other.wait()


@needs_bwrap
def test_cpu_time_judges_on_a_busy_machine(busy_machine: None) -> None:
    limits = Limits(cpu_seconds=0.4, wall_seconds=0.5)
    with Sandbox(2, limits, level="bwrap") as sandbox:
        start = time.monotonic()
        jobs = [Program(BURN + f"# {i}", calls=((0.25,),)) for i in range(4)]
        outcomes = sandbox.run(jobs)
        assert [outcome.status for outcome in outcomes] == ["ok"] * 4, outcomes
        assert time.monotonic() - start > limits.wall_seconds, "the machine was not busy"
        late = run(sandbox, BURN, 0.9)
        assert (late.status, late.reason) == ("timeout", "used more than 0.4 s of CPU time")


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.sleep(60)",
        "import threading\nthreading.Event().wait()",
        "import os\nos.read(os.pipe()[0], 1)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import os, time\nif os.fork() == 0: time.sleep(60)\nos.wait()",
    ],
)
def test_the_wall_limit_ends_what_uses_no_core(sandbox: Sandbox, source: str) -> None:
    program = StdinProgram(source, ("",))
    outcome = judge(
        sandbox, [Submission(program, ("",), limits=Limits(cpu_seconds=60, wall_seconds=0.3))]
    )[0]
    assert outcome.reason == "ran longer than 0.3 s without using a core"


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import os\nfor _ in range(3): os.fork()\nwhile True: pass",
        "import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n"
        "    if os.fork() == 0:\n        for _ in range(10**7): pass\n        os._exit(0)\n"
        "    try: os.wait()\n    except OSError: pass",
        "import threading\nfor _ in range(3): threading.Thread(target=lambda: exec('while 1: 1'))"
        ".start()",
    ],
)
def test_all_processes_and_threads_together_have_one_limit_of_cpu_time(
    sandbox: Sandbox, source: str
) -> None:
    limits = Limits(cpu_seconds=0.5, wall_seconds=60)
    verdict = judge(sandbox, [Submission(StdinProgram(source, ("",)), ("",), limits=limits)])[0]
    assert verdict.reason == "used more than 0.5 s of CPU time"


@needs_bwrap
def test_sleepers_share_their_wall_limit_and_workers_do_not_pile_up() -> None:
    sleeper = "import time\ndef f(x): time.sleep(60)"
    jobs = [Submission(Program(sleeper + f"# {i}", calls=((1,),)), (1,)) for i in range(16)]
    with Sandbox(1, Limits(wall_seconds=3.0), level="bwrap") as sandbox:
        start = time.monotonic()
        verdicts = judge(sandbox, [*jobs, SQUARE])
        assert [verdict.ok for verdict in verdicts] == [False] * 16 + [True]
        assert time.monotonic() - start < 8 * 3.0  # one after the other: 48 s
        assert len(sandbox.worker_pids()) <= 1 + pool.MOST_SPARE


@needs_bwrap
@pytest.mark.parametrize(
    "source",
    [
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os\nos._exit(0)",
        "open('/tmp/x', 'w').write('x')\n1 / 0",
    ],
)
def test_a_program_that_dies_at_once_costs_no_worker(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    with Sandbox(1, level="bwrap") as sandbox:
        run(sandbox, "def f(): pass")
        worker = sandbox.worker_pids()
        monkeypatch.setattr(Sandbox, "_run_alone", None)  # is not called
        for program in (Program(source, calls=((),)), StdinProgram(source, ("",))):
            assert sandbox.run([program, SQUARE.program])[0].status in ("crashed", "error", "ok")
        assert sandbox.worker_pids() == worker
