"""The seccomp program that every worker installs: system calls that no judged program needs.

It closes what namespaces and rlimits leave open: sockets (the only network barrier of the level
without namespaces), kernel memory that no rlimit counts (memfd, System V shared memory), changing
the limits or scheduling of the worker, and the calls that most kernel exploits start from.
Refused calls fail with EPERM, so a program sees an ordinary error.
"""

from __future__ import annotations

import platform
import struct

# name: (x86_64, aarch64)
REFUSED = {
    "socket": (41, 198),
    # A pair of sockets is allowed. These would leave names, or descriptors in flight, in the kernel
    # after the program.
    "bind": (49, 200),
    "connect": (42, 203),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "personality": (135, 92),
}
CLONE = (56, 220)
CLONE3 = (435, 435)
PRLIMIT64 = (302, 261)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
NEW_NAMESPACE_FLAGS = 0x7E020000

# Classic BPF: operation codes, offsets into struct seccomp_data, and answers.
LOAD, EQUAL, AT_LEAST, ANY_BIT, ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, KILL, NO_PERMISSION, NOT_IMPLEMENTED = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def build_filter(machine: str = platform.machine()) -> bytes:
    """Return the filter as packed sock_filter records, or b"" for an architecture not known."""
    if machine not in ARCHITECTURES:
        return b""
    column, architecture = ARCHITECTURES[machine]
    code = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (ANSWER, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        # The x32 calls are a second set of numbers for the same calls.
        code += [(AT_LEAST, 0, 1, 0x40000000), (ANSWER, 0, 0, KILL)]
    for numbers in REFUSED.values():
        code += [(EQUAL, 0, 1, numbers[column]), (ANSWER, 0, 0, NO_PERMISSION)]
    # The filter cannot look into clone3's struct; without it libc falls back to clone.
    code += [(EQUAL, 0, 1, CLONE3[column]), (ANSWER, 0, 0, NOT_IMPLEMENTED)]
    code += _refuse_if_any_bit(CLONE[column], NEW_NAMESPACE_FLAGS)
    # A process may lower its own limits (pid 0), not those of others.
    code += _refuse_if_any_bit(PRLIMIT64[column], 0xFFFFFFFF)
    code += [(ANSWER, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _refuse_if_any_bit(number: int, bits: int) -> list[tuple[int, int, int, int]]:
    """Refuse this call if its first argument has any of these bits."""
    return [
        (EQUAL, 0, 4, number),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, 0, 1, bits),
        (ANSWER, 0, 0, NO_PERMISSION),
        (ANSWER, 0, 0, ALLOW),
    ]
