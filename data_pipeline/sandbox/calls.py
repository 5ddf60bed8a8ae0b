"""The system calls that a held program may make: a filter in the kernel's own language (seccomp(2), BPF).

Numbers are those of asm/unistd.h; structures those of linux/filter.h and linux/seccomp.h.
"""

import ctypes
import errno
import os
import platform
from typing import Any

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""machine -> AUDIT_ARCH of linux/audit.h, column below."""
PIVOT_ROOT = (155, 41)
REFUSED = {
    # other processes
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "ptrace": (101, 117), "kcmp": (312, 272),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setsid": (112, 157), "setpgid": (109, 154), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "prctl": (157, 167),
    # the network, and memory that no limit counts
    "socket": (41, 198), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # file systems and namespaces
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": PIVOT_ROOT,
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60),
    "fanotify_init": (300, 262),
    # what Landlock does not cover of the files of the same user
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    # parts of the kernel where faults are found most
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "personality": (135, 92), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "syslog": (103, 116), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "vhangup": (153, 58),
}  # fmt: skip
"""System call -> its number on x86_64 and aarch64; answered with EPERM."""
CLONE3 = 435
"""Its flags lie in memory, out of a filter's sight: as if the kernel were older, so that the C library asks clone."""
OWN = {"kill": (62, 129), "tgkill": (234, 131), "tkill": (200, 130)}
"""Allowed on the process itself."""
PRLIMIT = (302, 261)
"""Allowed on process 0, which is the caller."""

libc = ctypes.CDLL(None, use_errno=True)


class JailError(Exception):
    """The program was not started, because it would not be held."""


def call(name: str, *arguments: Any) -> None:
    """A function of the C library that answers -1 where it fails.

    Raises:
        JailError: with the reason.
    """
    given = [a if isinstance(a, ctypes.Array | bytes | type(None)) else ctypes.c_long(a) for a in arguments]
    if getattr(libc, name)(*given) == -1:
        raise JailError(f"{name}: {os.strerror(ctypes.get_errno())}")


def architecture() -> tuple[int, int]:
    try:
        return ARCHITECTURES[platform.machine()]
    except KeyError:
        raise JailError(f"no filter of system calls for {platform.machine()}") from None


class Filter(ctypes.Structure):
    """An instruction of BPF: struct sock_filter."""

    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32)]


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]


LOAD, EQUAL, AT_LEAST, ANSWER = 0x20, 0x15, 0x35, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in struct seccomp_data."""
X32 = 0x40000000
"""System calls of another numbering on the same machine."""


def filter_of(pid: int) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, operand)."""
    audit, column = architecture()
    code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, audit), (ANSWER, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    code += [(AT_LEAST, 0, 1, X32), (ANSWER, 0, 0, KILL)]
    code += [(EQUAL, 0, 1, CLONE3), (ANSWER, 0, 0, REFUSE | errno.ENOSYS)]
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            code += [(EQUAL, 0, 1, number), (ANSWER, 0, 0, REFUSE | errno.EPERM)]
    for numbers, value in [*((numbers, pid) for numbers in OWN.values()), (PRLIMIT, 0)]:
        code += [(EQUAL, 0, 4, numbers[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 1, 0, value)]
        code += [(ANSWER, 0, 0, REFUSE | errno.EPERM), (ANSWER, 0, 0, ALLOW)]
    return [*code, (ANSWER, 0, 0, ALLOW)]


def give_up_system_calls() -> None:
    code = filter_of(os.getpid())
    instructions = (Filter * len(code))(*(Filter(*one) for one in code))
    program = Program(len(code), instructions)
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_long(SECCOMP_MODE_FILTER), ctypes.byref(program), 0, 0) == -1:
        raise JailError(f"seccomp: {os.strerror(ctypes.get_errno())}")
