"""The process inside the sandbox: forks one child per program and lets it do no harm.

The parent ships the text of this module and those it imports over `python -c`, so they need the
standard library only, and no path of the repository has to be visible inside.

Nothing of one program may reach the next, not even as residue in freed memory, for the next is
often another attempt at the same task. So the worker keeps requests and results as raw bytes in
buffers that it wipes, only the child decodes a request, and a worker whose /tmp was touched asks
to be replaced.
"""

import ctypes
import gc
import json
import os
import select
import signal
import struct
import time
from typing import Any

from spo_ext.sandbox.child import run_child
from spo_ext.sandbox.police import excess, kill_all

TICK_SECONDS = 0.02
# What programs import most, loaded once instead of once per program. Through dataclasses also ast,
# without which each child's first compile() takes 2 ms; not random, which reseeds at every fork.
PRELOADED = ("bisect", "copy", "dataclasses", "heapq", "itertools", "math", "re", "string")

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 22, 36, 38
SECCOMP_MODE_FILTER, CAPABILITY_VERSION_3 = 2, 0x20080522


def main(config: dict[str, Any]) -> None:
    for name in PRELOADED:
        __import__(name)
    os.chdir(config["tmp"])
    os.environ["TMPDIR"] = config["tmp"]
    # Made now because the filter forbids it later, to programs above all.
    stdin = os.memfd_create("stdin")
    drop_privileges(config)
    gc.disable()
    gc.freeze()
    write_all(frame({"ready": True}))
    serve(config, stdin)


def drop_privileges(config: dict[str, Any]) -> None:
    """Give up, for good, whatever the level has left to this process."""
    # Process 1 is immune to its children's signals, but for those that it handles.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # Should memory run out, the trainer is not the one to die.
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if config["user"] is not None:
        os.setgroups([])
        os.setgid(config["user"])
        os.setuid(config["user"])
    no_capabilities = (ctypes.c_uint32 * 6)()
    must(LIBC.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), no_capabilities), "capset")
    must(LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "set child subreaper")
    # After setuid, which resets these two. Not dumpable: no program can read or write this
    # process through ptrace or /proc.
    must(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "set parent-death signal")
    must(LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "set not dumpable")
    must(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "set no_new_privs")
    install_filter(bytes.fromhex(config["filter"]))


def install_filter(code: bytes) -> None:
    """Install a seccomp program (see syscall_filter), which every child inherits."""
    if not code:
        return
    instructions = ctypes.create_string_buffer(code, len(code))
    pointer = ctypes.addressof(instructions)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, pointer))
    must(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), "install the filter")


def must(result: int, action: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"cannot {action}")


class Stream:
    """Bytes that a program writes to a pipe, kept in one buffer that can be wiped."""

    def __init__(self, capacity: int) -> None:
        self.buffer = bytearray(capacity + 1)
        self.size = 0
        self.fd = -1

    def read(self) -> bool:
        """Take what is there; False at the end of the pipe or once over the capacity."""
        room = memoryview(self.buffer)[self.size :]
        taken = os.readv(self.fd, [room]) if room else 0
        self.size += taken
        return taken > 0

    def full(self) -> bool:
        return self.size == len(self.buffer)

    def take(self) -> memoryview:
        return memoryview(self.buffer)[: self.size]

    def wipe(self) -> None:
        self.buffer[: self.size] = bytes(self.size)
        self.size = 0


def serve(config: dict[str, Any], stdin: int) -> None:
    """Answer requests until the parent closes its end."""
    request = bytearray(1 << 16)
    result, stdout = Stream(config["output_bytes"]), Stream(config["output_bytes"])
    tmp_ctime = os.stat(".").st_ctime_ns
    while True:
        size = read_size()
        if size > len(request):
            request = bytearray(size)
        read_exactly(memoryview(request)[:size])
        header = run_one(config, memoryview(request)[:size], stdin, result, stdout)
        header["dirty"] = os.stat(".").st_ctime_ns != tmp_ctime
        request[:size] = bytes(size)
        os.ftruncate(stdin, 0)
        write_all(frame(header))
        for stream in (result, stdout):
            write_all(stream.take())
            stream.wipe()


def run_one(
    config: dict[str, Any], request: memoryview, stdin: int, result: Stream, stdout: Stream
) -> dict[str, Any]:
    """Run one program in a child and leave none of its processes. Returns the reply's header."""
    result.fd, result_end = os.pipe()
    stdout.fd, stdout_end = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        gc.enable()
        run_child(json.loads(bytes(request)), config, stdin, stdout_end, result_end)
    os.close(result_end)
    os.close(stdout_end)
    end = watch(config, child, (result, stdout))
    os.kill(child, signal.SIGKILL)
    _, wait_status, _ = os.wait4(child, 0)
    kill_all()
    for stream in (result, stdout):
        while stream.read():
            pass  # To the end, which comes: nobody is left to hold the other end.
        end = "output" if stream.full() else end
        os.close(stream.fd)
    return {
        "end": end,
        "wait_status": wait_status,
        "seconds": time.monotonic() - start,
        "result_bytes": result.size,
        "stdout_bytes": stdout.size,
    }


def watch(config: dict[str, Any], child: int, streams: tuple[Stream, ...]) -> str:
    """Wait until the child ends ("exit") or goes over a limit; returns which."""
    deadline = time.monotonic() + config["wall_seconds"]
    next_tick = time.monotonic() + TICK_SECONDS
    pidfd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, 0)  # Only the parent's hanging up.
    for stream in streams:
        poll.register(stream.fd, select.POLLIN)
    end = ""
    while not end:
        ready = {fd for fd, _ in poll.poll(1 + 1000 * max(0.0, next_tick - time.monotonic()))}
        if 0 in ready:
            kill_all()
            os._exit(0)
        for stream in streams:
            if stream.fd in ready and not stream.read():
                poll.unregister(stream.fd)
            end = "output" if stream.full() else end
        if pidfd in ready:
            end = end or "exit"
        elif time.monotonic() >= next_tick:
            end = end or ("wall" if time.monotonic() >= deadline else excess(config))
            next_tick = time.monotonic() + TICK_SECONDS
    os.close(pidfd)
    return end


def frame(header: dict[str, Any]) -> bytes:
    body = json.dumps(header).encode()
    return struct.pack("!I", len(body)) + body


def read_size() -> int:
    size = bytearray(4)
    read_exactly(memoryview(size))
    return int.from_bytes(size, "big")


def read_exactly(view: memoryview) -> None:
    while view:
        taken = os.readv(0, [view])
        if taken == 0:
            os._exit(0)  # The parent has closed its end.
        view = view[taken:]


def write_all(data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
