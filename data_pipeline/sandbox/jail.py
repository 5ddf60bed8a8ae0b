"""Runs one program where it can do no harm. `data_pipeline.sandbox.run` starts this file as a script, in a fresh
process: it imports nothing of ours.

Three processes: this one takes leave of the machine's namespaces; the first process of the new ones makes an empty
file system with the standard library in it, read-only; its only child gives up the rest and becomes the program. When
the second ends, the kernel ends all that is left in there.

Usage: python -I jail.py PIPE < request.json; the pipe gets {"code": exit code, 128 + n for signal n} or {"error": why}.

Sources: namespaces(7), mount_namespaces(7), pivot_root(2), mount_setattr(2), seccomp(2), prctl(2), setrlimit(2).
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
NOBODY = 65534
MOUNT_SETATTR = 442

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("null", "zero", "random", "urandom")
PROGRAM, SCRATCH = "program.py", "tmp"
INTERPRETER = os.path.realpath(sys.executable)
"""The Python outside of any virtual environment."""
INODES = 1024

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
    # parts of the kernel where faults are found most
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "personality": (135, 92), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "syslog": (103, 116), "iopl": (172, None),
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


def leave_namespaces() -> None:
    """From here on: no other processes, no network, mounts of our own, a user without any right."""
    uid, gid = os.getuid(), os.getgid()
    call(
        "unshare",
        CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP,
    )
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {gid} 1")


def needed() -> list[str]:
    """What the interpreter loads, outermost directories first."""
    paths = [*LIBRARIES, sysconfig.get_path("stdlib"), sysconfig.get_config_var("LIBDIR") or "", INTERPRETER]
    return sorted({path for path in paths if path and os.path.lexists(path)})


def make_root(root: Path, program: str, disk_bytes: int) -> None:
    """An empty file system at `root` with what is needed, read-only, and a scratch directory; then nothing else."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", bytes(root), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=16m,mode=755")
    (root / PROGRAM).write_text(program)
    shown: list[str] = []
    for path in needed():
        if any(path.startswith(f"{other}/") for other in shown):
            continue
        there = root / path.lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(path):
            there.symlink_to(os.readlink(path))
            continue
        bind(Path(path), there, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
        shown.append(path)
    (root / "dev").mkdir()
    for device in DEVICES:
        bind(Path("/dev", device), root / "dev" / device, ATTR_RDONLY | ATTR_NOSUID)
    (root / SCRATCH).mkdir()
    options = f"size={disk_bytes},nr_inodes={INODES},mode=700".encode()
    call("mount", b"tmpfs", bytes(root / SCRATCH), b"tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    _, column = architecture()
    call("syscall", PIVOT_ROOT[column], b".", b".")
    call("umount2", b".", MNT_DETACH)
    set_attributes(b"/", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, recursive=False)


def bind(path: Path, there: Path, attributes: int) -> None:
    if path.is_dir():
        there.mkdir(parents=True, exist_ok=True)
    else:
        there.touch()
    call("mount", bytes(path), bytes(there), None, MS_BIND | MS_REC, None)
    set_attributes(bytes(there), attributes, recursive=True)


def set_attributes(path: bytes, attributes: int, recursive: bool) -> None:
    content = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path, flags, content, ctypes.sizeof(content))


def limit(limits: dict[str, int]) -> None:
    """Of this process and of what it becomes."""
    for name, most in {
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_CPU": limits["cpu_s"],
        "RLIMIT_FSIZE": limits["disk_bytes"],
        "RLIMIT_NOFILE": limits["files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }.items():
        resource.setrlimit(getattr(resource, name), (most, most))


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
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_long(SECCOMP_MODE_FILTER), ctypes.byref(program), 0, 0) == -1:
        raise JailError(f"seccomp: {os.strerror(ctypes.get_errno())}")


def become(request: dict[str, Any], program: str, scratch: str, tell: int) -> None:
    """Turn into the program; comes back only where that fails, and then says why."""
    try:
        os.chdir(scratch)
        given = os.open("stdin", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink("stdin")
        os.write(given, request["stdin"].encode())
        os.lseek(given, 0, os.SEEK_SET)
        os.dup2(given, 0)
        os.close(given)
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        limit(request["limits"])
        give_up_system_calls()
        variables = {"PATH": "/usr/bin:/bin", "HOME": scratch, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        os.execve(INTERPRETER, ["python", "-I", "-B", program], variables)  # noqa: S606  no shell is wanted
    except (OSError, JailError, ValueError) as error:
        os.write(tell, json.dumps({"error": str(error)}).encode())
    os._exit(1)


def first_process(request: dict[str, Any], tell: int) -> int:
    """Of the new namespaces: starts the program, waits for it, and takes what it left behind along. Its exit code."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that nothing in there can interrupt it
    root = Path(request["root"])
    if request["namespaces"]:
        make_root(root, request["program"], request["limits"]["disk_bytes"])
        program, scratch = f"/{PROGRAM}", f"/{SCRATCH}"
    else:
        (root / PROGRAM).write_text(request["program"])
        program, scratch = str(root / PROGRAM), str(root / SCRATCH)
        os.mkdir(scratch)
    child = os.fork()
    if child == 0:
        become(request, program, scratch, tell)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main(tell: int) -> int:
    os.set_inheritable(tell, False)
    try:
        request = json.load(sys.stdin)
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        architecture()
        if request["namespaces"]:
            leave_namespaces()
        first = os.fork()
        if first == 0:
            try:
                os._exit(first_process(request, tell))
            except (OSError, JailError) as error:
                os.write(tell, json.dumps({"error": str(error)}).encode())
                os._exit(1)
        _, status = os.waitpid(first, 0)
        os.write(tell, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
    except (OSError, JailError) as error:
        os.write(tell, json.dumps({"error": str(error)}).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
