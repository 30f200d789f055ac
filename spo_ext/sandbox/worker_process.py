"""The parent's handle on one worker: start it, exchange frames without blocking, end it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any

from spo_ext.sandbox.jobs import Job, Reply, starved_seconds
from spo_ext.sandbox.launch import ENVIRONMENT, Launcher
from spo_ext.sandbox.records import Limits, SandboxError

# Beyond what a worker gives a program, for starting, killing and reaping on a loaded machine.
GRACE_SECONDS = 15.0
MAX_HEADER_BYTES = 4096


class WorkerDied(Exception):
    """A worker ended, hung or broke the protocol while it had a request."""


class Nursery:
    """The process that forks workers: started when first needed, and anew if it has ended."""

    def __init__(self, launcher: Launcher, limits: Limits) -> None:
        self._launcher, self._limits = launcher, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def fork(self, user: int | None, descriptors: tuple[int, ...]) -> int:
        """A pidfd of a new worker with these as stdin, stdout and stderr. Raises SandboxError."""
        request = str(-1 if user is None else user).encode()
        for fresh in (self._channel is None, True):
            if fresh:
                self.close()
                self._start()
            assert self._channel is not None
            with contextlib.suppress(OSError):
                socket.send_fds(self._channel, [request], descriptors)
                _, found, _, _ = socket.recv_fds(self._channel, 16, 1)
                if found:
                    return found[0]
            if fresh:
                break
        assert self._process is not None
        words = _last_words(self._process)
        self.close()
        raise SandboxError(f"cannot start a sandbox worker: {words}")

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(GRACE_SECONDS)
        with theirs:
            command = self._launcher.command(self._limits, None, "")
            self._process = _start(command, theirs.fileno(), subprocess.DEVNULL)

    def close(self) -> None:
        """End it, and with it all of its workers."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None


class Forked:
    """A worker of a nursery, with the part of Popen's interface that is needed here."""

    def __init__(self, nursery: Nursery, user: int | None) -> None:
        (stdin, given), (taken, stdout), (said, stderr) = (os.pipe() for _ in range(3))
        self.stdin = open(given, "wb", buffering=0)
        self.stdout, self.stderr = (open(fd, "rb", buffering=0) for fd in (taken, said))
        try:
            self._pidfd = nursery.fork(user, (stdin, stdout, stderr))
        except BaseException:
            for file in (self.stdin, self.stdout, self.stderr):
                file.close()
            raise
        finally:
            for fd in (stdin, stdout, stderr):
                os.close(fd)
        with open(f"/proc/self/fdinfo/{self._pidfd}") as about:
            self.pid = next(int(line.split()[1]) for line in about if line.startswith("Pid:"))

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        os.close(self._pidfd)

    def _ended(self, timeout: float | None) -> int | None:
        """-1 if it has: how is known to its parent only."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return -1 if poll.poll(None if timeout is None else timeout * 1000) else None


class WorkerProcess:
    """One sandboxed worker. It holds at most one request at a time."""

    def __init__(self, launcher: Launcher, limits: Limits, nursery: Nursery | None) -> None:
        self._max_bytes = 0
        self._boundary = launcher.level != "rlimits"
        self._to_send = b""
        self._received = bytearray()
        self._ready = False
        self.deadline = 0.0
        self.asleep = False
        self._process: subprocess.Popen[bytes] | Forked
        self._scratch = tempfile.mkdtemp(prefix="spo-sandbox-") if launcher.needs_scratch else ""
        user = launcher.pick_user()
        if nursery is not None:
            self._process = Forked(nursery, user)
        else:
            try:
                if user is not None and self._scratch:
                    os.chown(self._scratch, user, user)
                command = launcher.command(limits, user, self._scratch)
                self._process = _start(command, subprocess.PIPE, subprocess.PIPE)
            except (OSError, SandboxError):
                self._remove_scratch()
                raise
        for fd in (self.read_fd, self.write_fd):
            os.set_blocking(fd, False)

    @property
    def read_fd(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def write_fd(self) -> int:
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def sending(self) -> bool:
        return bool(self._to_send)

    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, job: Job) -> None:
        """Begin to send a request; call `write` while `sending` and the pipe has room."""
        self._to_send = job.request
        self.asleep = False
        self._max_bytes = job.limits.output_bytes
        self.deadline = time.monotonic() + starved_seconds(job.limits) + GRACE_SECONDS
        self.write()

    def write(self) -> None:
        try:
            self._to_send = self._to_send[os.write(self.write_fd, self._to_send) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._to_send = b""  # It has died, as reading will tell.

    def read(self) -> Reply | None:
        """Take what the worker has sent; a reply once it is complete."""
        try:
            data = os.read(self.read_fd, 1 << 16)
        except BlockingIOError:
            return None
        if not data:
            raise WorkerDied(_last_words(self._process))
        self._received += data
        try:
            if not self._ready and (greeting := self._parse(self._received)):
                self._received = self._received[greeting[1] :]
                self._ready = True
            return self._take_reply() if self._ready else None
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise WorkerDied(f"the worker broke the protocol: {error!r}") from None

    def _take_reply(self) -> Reply | None:
        parsed = self._parse(self._received)
        if parsed is None:
            return None
        header, start = parsed
        if header.get("asleep"):
            self.asleep = True
            del self._received[:start]
            return self._take_reply()
        sizes = [int(header["result_bytes"]), int(header["stdout_bytes"])]
        if not all(0 <= size <= self._max_bytes + 1 for size in sizes):
            raise ValueError(f"sizes {sizes}")
        middle, end = start + sizes[0], start + sum(sizes)
        if len(self._received) < end:
            return None
        reply = Reply(
            end=str(header["end"]),
            program_status=_status(header["program_status"]),
            exam_status=_status(header["exam_status"]),
            seconds=float(header["seconds"]),
            dirty=bool(header["dirty"]),
            result=bytes(self._received[start:middle]),
            stdout=bytes(self._received[middle:end]),
        )
        del self._received[:end]
        return reply

    @staticmethod
    def _parse(data: bytearray) -> tuple[dict[str, Any], int] | None:
        """A frame's header and where it ends, or None while incomplete."""
        if len(data) < 4:
            return None
        size = int.from_bytes(data[:4], "big")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        if len(data) < 4 + size:
            return None
        return dict(json.loads(data[4 : 4 + size])), 4 + size

    def close(self) -> None:
        """End the worker, and with it all that runs inside."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not self._boundary:
            # Nothing else ends its children: let it do so, which it does when its input closes.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        if isinstance(self._process, Forked):
            self._process.close()
        self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _start(command: list[str], stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """Raises SandboxError."""
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the trainer to handle.
        )
    except OSError as error:
        raise SandboxError(f"cannot start a sandbox worker: {error}") from error


def _last_words(process: subprocess.Popen[bytes] | Forked) -> str:
    """Wait for a process to end and return what it said last, for the error message."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.kill()
    code = process.wait()
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        text = os.read(process.stderr.fileno(), 4096).decode(errors="replace")
        if text.strip():
            return " ".join(text.split())[-500:]
    return f"the worker ended with code {code}"


def _status(value: object) -> int | None:
    return None if value is None else int(str(value))
