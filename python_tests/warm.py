"""Processes that begin with everything imported, forked from a server that has imported it once.

To import torch and transformers takes a process seconds, and the tests start some hundred of them.
`Process` is what the tests use of subprocess.Popen; `python warm.py spo ...` is a command for
scripts. A child leads a session of its own and is killed with the process that asked for it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_VARIABLE = "WARM_SOCKET"  # the socket of the server
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def address() -> str:
    """The socket of this process's server, which is started on first use and ends with it."""
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = f"{tempfile.mkdtemp(prefix='spo-warm-')}/socket"
        here = Path(__file__).parent
        path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", os.environ[_VARIABLE]],
            stdin=subprocess.PIPE,  # its end tells the server that this process is gone
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(server.kill)
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    return os.environ[_VARIABLE]


class Process:
    """`spo ARGUMENTS`, Python code or a script, begun as subprocess.Popen begins a command.

    Args:
        command: ["spo", ...], ["-c", code, ...] or ["script.py", ...].
        stdin, stdout, stderr: None (as here), subprocess.PIPE, subprocess.DEVNULL or a file.
        env: the whole environment; None takes this one.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.stdin, inner_in = _end(stdin, 0)
        self.stdout, inner_out = _end(stdout, 1)
        self.stderr, inner_err = (
            (None, inner_out) if stderr == subprocess.STDOUT else _end(stderr, 2)
        )
        self._socket = _ask(
            command,
            os.fspath(cwd or os.getcwd()),
            env or os.environ,
            [inner_in, inner_out, inner_err],
        )
        for number in {inner_in, inner_out, inner_err} - {0, 1, 2}:
            os.close(number)
        self._answers = self._socket.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self._read()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("warm process", timeout or 0)
            self._read()
        assert self.returncode is not None
        return self.returncode

    def _read(self) -> None:
        self.returncode = int(self._answers.readline())
        self._answers.close()
        self._socket.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(
        self, input: str | None = None, timeout: float | None = None
    ) -> tuple[str, str]:
        """What it writes until it ends, as text."""
        said = {1: "", 2: ""}

        def read(number: int, stream: IO[str]) -> None:
            said[number] = stream.read()
            stream.close()

        streams = [(1, self.stdout), (2, self.stderr)]
        threads = [threading.Thread(target=read, args=pair) for pair in streams if pair[1]]
        for thread in threads:
            thread.start()
        if self.stdin is not None:
            try:
                self.stdin.write(input or "")
                self.stdin.close()
            except BrokenPipeError:
                pass
        self.wait(timeout)
        for thread in threads:
            thread.join(timeout)
        return said[1], said[2]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def _end(given: int | IO[Any] | None, number: int) -> tuple[Any, int]:
    """The end of a stream that stays here, and the one that the child gets."""
    if given is None:
        return None, number
    if given == subprocess.PIPE:
        ends = os.pipe()
        inner, outer = ends if number == 0 else ends[::-1]
        return open(outer, "w" if number == 0 else "r"), inner
    if given == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_RDWR)
    return None, os.dup(given if isinstance(given, int) else given.fileno())


def _ask(
    command: Sequence[str], cwd: str, env: Mapping[str, str], streams: Sequence[int]
) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address())
    request = json.dumps([[*command], cwd, {**env}]).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [*streams])
    connection.sendall(request)
    return connection


def _serve(path: str) -> None:
    import matplotlib
    import peft  # noqa: F401
    import trainer_process  # noqa: F401
    import trl  # noqa: F401
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM  # noqa: F401

    import spo_ext.cli  # noqa: F401
    from spo_ext.data import exporter, importer  # noqa: F401
    from spo_ext.evaluation import commands, report  # noqa: F401
    from spo_ext.trainer import SPOConfig, SPOTrainer  # noqa: F401

    matplotlib.use("agg")
    gc.collect()
    gc.freeze()  # what the children share they need not search
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that look after children
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _look_after(connection)
            connection.close()


def _look_after(connection: socket.socket) -> None:
    """Runs one child, in which this returns; kills it when nobody is there any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(head, "big"):
        request += connection.recv(1 << 20)
    child = os.fork()
    if child == 0:
        connection.close()
        _become(*json.loads(request), streams)
    for number in streams:
        os.close(number)
    connection.sendall(b"%d\n" % child)
    handle = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([connection, handle], [], [])
        if handle in ready:
            break
        message = connection.recv(1)
        if not message:
            os.killpg(child, signal.SIGKILL)
            os._exit(0)
        os.kill(child, message[0])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(b"%d\n" % status)
    except BrokenPipeError:
        pass
    os._exit(0)


def _become(command: list[str], cwd: str, env: dict[str, str], streams: list[int]) -> None:
    """What was asked for, in this process."""
    import torch

    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
    status: object = 0
    try:
        _run(command)
    except SystemExit as end:
        status = end.code or 0
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    # As Python ends, but for taking down all that was imported, which takes two seconds.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(command: list[str]) -> None:
    what, *rest = command
    if what == "spo":
        from spo_ext.cli import main

        sys.argv = command
        sys.exit(main())
    if what == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = command
    sys.path.insert(0, os.path.dirname(os.path.abspath(what)))
    runpy.run_path(what, run_name="__main__")


def _command() -> None:
    """For scripts: the child has this process's streams, signals and status."""
    process = Process(sys.argv[1:])
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: process._socket.send(bytes([number])))
    status = process.wait()
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    _serve(sys.argv[2]) if sys.argv[1] == "serve" else _command()
