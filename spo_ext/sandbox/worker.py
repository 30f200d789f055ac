"""The process inside the sandbox: forks a child for each program and lets it do no harm.

Where namespaces can be made inside, there is a nursery: a process that has loaded all that programs
need and forks the workers, so that one more costs milliseconds: for programs that sleep, and in
place of one that is not as new. Namespaces, mounts and user of a worker are its own.

The parent ships the text of this module and those it imports over `python -c`, so they need the
standard library only, and no path of the repository has to be visible inside.

Nothing of one program may reach the next, not even as residue in freed memory, for the next is
often another attempt at the same task. So the worker keeps requests and results as raw bytes in
buffers that it wipes, only the children decode a request, and another child removes what was left
in /tmp; a worker whose /tmp is not easily emptied asks to be replaced. What is expected is read
after the program's process was forked: only the examiner's, which is forked then, has it in its
memory.
"""

import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

from spo_ext.sandbox.child import confine, run_child
from spo_ext.sandbox.exam import read_seconds, run_exam
from spo_ext.sandbox.police import Usage, kill_all
from spo_ext.sandbox.prelude import add_prelude

# From look to look at a program: while it is young, lest one that sleeps at once keeps another from
# a core; then; and while it sleeps.
FIRST_TICK, TICK_SECONDS, ASLEEP_TICK = 0.004, 0.02, 0.06
YOUNG_SECONDS = 0.03
# Beyond the prelude, what programs import most, loaded once instead of once per program.
PRELOADED = ("dataclasses", "decimal", "threading")
# The examiner's CPU time: that of a program's limit for each of reading, comparing, and the tests'
# own work, and some more for the tests' start.
EXAM_CPU_FACTOR, EXAM_CPU_MORE = 3, 1
MOST_FILES = 1000  # and folders that are removed for the next program
# After so long without a core the parent is told, which may then use it for another program.
ASLEEP_SECONDS = 0.006

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC_HELD = ctypes.PyDLL(None, use_errno=True)  # A fork must hold the interpreter's lock.
CLONE = {"x86_64": 56, "aarch64": 220}
# Mounts, IPC, processes, network.
NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 22, 36, 38
SECCOMP_MODE_FILTER, CAPABILITY_VERSION_3 = 2, 0x20080522


def main(config: dict[str, Any]) -> None:
    sys.path += config["package_folders"]
    for name in (*PRELOADED, *config["packages"]):
        __import__(name)
    add_prelude()
    sys.set_int_max_str_digits(0)  # A program may print numbers of any length.
    os.cpu_count = lambda: 4  # A pool of one process per core must fit in the limit of processes.
    tmp = os.environ["TMPDIR"] = config["folders"][0]
    gc.disable()
    gc.freeze()
    if config["nursery"]:
        become_worker(config)
    os.chdir(tmp)
    drop_privileges(config)
    write_all(frame({"ready": True}))
    serve(config)


def become_worker(config: dict[str, Any]) -> None:
    """Fork a worker whenever the parent asks for one, and return in the worker.

    A request holds the worker's user and its three standard descriptors; the answer, a descriptor
    that stands for the worker. None of this process's own reaches the worker.
    """
    channel = socket.socket(fileno=0)
    flags = ctypes.c_long(NEW_NAMESPACES | signal.SIGCHLD)
    nothing = (ctypes.c_long(0),) * 4
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 64, 3)
        if not message:
            os._exit(0)  # The parent is gone, or done with all of its workers.
        pid = LIBC_HELD.syscall(CLONE[os.uname().machine], flags, *nothing)
        if pid == 0:
            break
        must(min(pid, 0), "fork a worker")
        worker = os.pidfd_open(pid)
        socket.send_fds(channel, [b"worker"], [worker])
        for fd in (worker, *descriptors):
            os.close(fd)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
    channel.detach()
    for place, fd in enumerate(descriptors):
        os.dup2(fd, place)
        os.close(fd)
    user = int(message)
    config["user"] = None if user < 0 else user
    mount_own(config["file_bytes"])


def mount_own(size: int) -> None:
    """What a worker shares with no other: its processes in /proc, and the folders to write to."""

    def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
        names = (source.encode(), target.encode(), kind and kind.encode())
        must(LIBC.mount(*names, ctypes.c_ulong(flags), data.encode()), f"mount {target}")

    mount("none", "/", None, MS_PRIVATE | MS_REC)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in ("sys", "sysrq-trigger", "irq", "bus"):  # As bubblewrap has them.
        path = f"/proc/{name}"
        if os.path.exists(path):
            mount(path, path, None, MS_BIND | MS_REC)
            mount(
                "none",
                path,
                None,
                MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC,
            )
    for folder in ("/tmp", "/dev/shm"):
        mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={size}")


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


def install_filter(code: bytes) -> None:
    """Install a seccomp program (see syscall_filter) in this process, a child of the worker."""
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
    """Bytes that come out of a pipe, kept in one buffer that can be wiped."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.capacity = self.size = 0
        self.fd = -1

    def open(self, capacity: int) -> int:
        """Make the pipe, to hold so many bytes; returns the end to write to."""
        self.capacity = capacity
        if capacity >= len(self.buffer):
            self.buffer = bytearray(capacity + 1)
        self.fd, write_end = os.pipe()
        os.set_blocking(self.fd, False)  # Whoever still holds the other end, reading must end.
        return write_end

    def read(self) -> bool:
        """Take what is there; False at the end of the pipe, if it is empty or over the capacity."""
        room = memoryview(self.buffer)[self.size : self.capacity + 1]
        try:
            taken = os.readv(self.fd, [room]) if room else 0
        except BlockingIOError:
            return False
        self.size += taken
        return taken > 0

    def full(self) -> bool:
        return self.size > self.capacity

    def take(self) -> memoryview:
        return memoryview(self.buffer)[: self.size]

    def wipe(self) -> None:
        self.buffer[: self.size] = bytes(self.size)
        self.size = 0


class Request:
    """Raw bytes of a request, kept in one buffer that can be wiped."""

    def __init__(self) -> None:
        self.buffer = bytearray(1 << 16)
        self.size = 0

    def read(self) -> None:
        size = read_size()
        if size > len(self.buffer):
            self.buffer = bytearray(size)
        self.size = size
        read_exactly(memoryview(self.buffer)[:size])

    def parsed(self) -> dict[str, Any]:
        """The request, in a process that ends with it."""
        return json.loads(bytes(memoryview(self.buffer)[: self.size]))  # type: ignore[no-any-return]

    def wipe(self) -> None:
        self.buffer[: self.size] = bytes(self.size)


def serve(config: dict[str, Any]) -> None:
    """Answer requests until the parent closes its end.

    A request is three frames: the limits, what the program may see, and what only the examiner
    may; a script has the text of its stdin in place of the latter.
    """
    program, other = Request(), Request()
    result, stdout = Stream(), Stream()
    new = {folder: os.stat(folder) for folder in config["folders"]}
    while True:
        header = read_header()
        program.read()
        reply = run_one(config, header, (program, other), (result, stdout))
        reply["dirty"] = not all([emptied(*each) for each in new.items()])
        write_all(frame(reply))
        for stream in (result, stdout):
            write_all(stream.take())
            stream.wipe()


def emptied(folder: str, new: os.stat_result) -> bool:
    """Remove what a program left in its folder, if that is not too much; whether all is as new.

    The folder's own times are made those of this moment, touched or not.
    """
    try:
        state = os.stat(folder)
        # Of a tmpfs, the size counts the entries. Their names stay out of this process's memory.
        if state.st_size != new.st_size or state.st_dev == os.stat("/").st_dev:
            cleaner = os.fork()
            if cleaner == 0:
                LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                os._exit(not removed(folder))
            if os.waitpid(cleaner, 0)[1] != 0:
                return False
        os.close(os.open(f"{folder}/.new", os.O_CREAT | os.O_EXCL))
        os.unlink(f"{folder}/.new")
        if state.st_uid == os.getuid():  # A program may then change more than the times.
            os.chmod(folder, 0o1777)
            os.utime(folder)
            return not os.listxattr(folder)
        return True
    except OSError:
        return False


def removed(folder: str) -> bool:
    """Remove all that is in a folder, unless it is more than making a worker anew is worth."""
    left, waiting = MOST_FILES, [folder]
    inner: list[str] = []
    try:
        while waiting:
            path = waiting.pop()
            for entry in os.scandir(path):
                left -= 1
                if left < 0:
                    return False
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
                    inner.append(entry.path)
                    waiting.append(entry.path)
                else:
                    os.unlink(entry.path)
        for path in reversed(inner):
            os.rmdir(path)
    except OSError:
        return False
    return True


def run_one(
    config: dict[str, Any],
    header: dict[str, Any],
    requests: tuple[Request, Request],
    streams: tuple[Stream, Stream],
) -> dict[str, Any]:
    """Run one program in a child and leave none of its processes. Returns the reply's header."""
    limits, script = header["limits"], header["script"]
    result, stdout = streams
    result_end = result.open(limits["output_bytes"])
    stdout_end = stdout.open(limits["output_bytes"])
    opened = [result_end, stdout_end]
    start = time.monotonic()
    if script:
        requests[1].read()
        # Made anew, lest what can be attached to a file or a descriptor lasts.
        stdin = os.memfd_create("stdin")
        opened.append(stdin)
        write_all(memoryview(requests[1].buffer)[: requests[1].size], stdin)
        os.lseek(stdin, 0, os.SEEK_SET)
        requests[1].wipe()
        descriptors: tuple[int, ...] = (stdin, stdout_end, -1, result_end)
    else:
        (answers, answers_end), (calls, calls_end) = os.pipe(), os.pipe()
        opened += [answers, answers_end, calls, calls_end]
        descriptors = (-1, stdout_end, -1, answers_end, calls)
    child = fork(config)
    if child == 0:
        run_child(requests[0].parsed(), limits, config, descriptors)
    requests[0].wipe()
    examiner = 0
    if not script:
        requests[1].read()
        examiner = fork(config)
        if examiner == 0:
            seconds = EXAM_CPU_FACTOR * limits["cpu_seconds"] + EXAM_CPU_MORE
            seconds += read_seconds(limits["output_bytes"])
            own = {**limits, "cpu_seconds": seconds}
            confine((-1, -1, -1, result_end, answers, calls_end), own, config)
            run_exam(requests[1].parsed(), child, limits["output_bytes"])
        requests[1].wipe()
    for fd in opened:
        os.close(fd)
    end = watch(limits, child, examiner, streams)
    program_status, exam_status = ended(child), ended(examiner)
    kill_all()
    for stream in streams:
        while stream.read():
            pass
        end = "output" if stream.full() else end
        os.close(stream.fd)
    return {
        "end": end,
        "program_status": program_status,
        "exam_status": exam_status,
        "seconds": time.monotonic() - start,
        "result_bytes": result.size,
        "stdout_bytes": stdout.size,
    }


def fork(config: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        install_filter(bytes.fromhex(config["filter"]))
        gc.enable()
    return pid


def ended(pid: int) -> int | None:
    """The wait status of a process that has ended by itself; None, and it is killed, if not."""
    if pid == 0:
        return None
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        return status
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def watch(limits: dict[str, Any], child: int, examiner: int, streams: tuple[Stream, ...]) -> str:
    """Wait until the last of the two ends ("exit") or a limit is passed; returns which.

    Time counts against the program while it uses a core or while none of its processes wants one,
    never while it waits for a core that others use.
    """
    usage = Usage(examiner)
    begun = time.monotonic()
    starved = begun + limits["starved_seconds"]
    tick = FIRST_TICK
    next_tick = begun + tick
    pidfd = os.pidfd_open(examiner or child)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, 0)  # Only the parent's hanging up.
    for stream in streams:
        poll.register(stream.fd, select.POLLIN)
    end, busy, told = "", False, False
    while not end:
        ready = {fd for fd, _ in poll.poll(1 + 1000 * max(0.0, next_tick - time.monotonic()))}
        if 0 in ready:
            kill_all()
            os._exit(0)
        for stream in streams:
            if stream.fd in ready:
                if stream.read():
                    busy = True
                else:
                    poll.unregister(stream.fd)
            end = "output" if stream.full() else end
        if pidfd in ready:
            end = end or "exit"
        elif time.monotonic() >= next_tick:
            end = end or usage.excess(limits, busy, tick)
            young = not told and time.monotonic() < begun + YOUNG_SECONDS
            if usage.idle > ASLEEP_SECONDS and not told:
                told = True
                write_all(frame({"asleep": True}))
            end = end or ("starved" if time.monotonic() > starved else "")
            tick = FIRST_TICK if young else TICK_SECONDS
            if told and usage.still:
                tick = min(ASLEEP_TICK, max(FIRST_TICK, limits["wall_seconds"] - usage.idle))
            next_tick, busy = time.monotonic() + tick, False
    os.close(pidfd)
    return end


def frame(header: dict[str, Any]) -> bytes:
    body = json.dumps(header).encode()
    return struct.pack("!I", len(body)) + body


def read_header() -> dict[str, Any]:
    body = bytearray(read_size())
    read_exactly(memoryview(body))
    return json.loads(body)  # type: ignore[no-any-return]


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


def write_all(data: bytes | memoryview, fd: int = 1) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
