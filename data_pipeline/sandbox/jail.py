"""Runs one program where it can do no harm. `data_pipeline.sandbox.run` calls `main` in a fresh process that has opened
nothing of ours.

Three processes: this one takes leave of the machine's namespaces; the first process of the new ones makes an empty
file system with the standard library in it, read-only; its only child gives up the rest and becomes the program. When
the second ends, the kernel ends all that is left in there. Where no namespaces are to be used, Landlock takes the files
away in place of the empty file system.

The request is JSON on standard input; the pipe gets {"code": exit code, 128 + n for signal n} or {"error": why}.

Sources: namespaces(7), mount_namespaces(7), pivot_root(2), mount_setattr(2), landlock(7), capabilities(7), seccomp(2),
prctl(2), setrlimit(2).
"""

import ctypes
import json
import os
import resource
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Any

from data_pipeline.sandbox.calls import PIVOT_ROOT, JailError, architecture, call, give_up_system_calls, libc

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
NOBODY = 65534
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
CAPABILITY_VERSION = 0x20080522

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("null", "zero", "random", "urandom")
PROGRAM, SCRATCH = "program.py", "tmp"
INTERPRETER = os.path.realpath(sys.executable)
"""The Python outside of any virtual environment."""
INODES = 1024


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


class Beneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("directory", ctypes.c_int32)]


EXECUTE, WRITE, READ, LIST, TRUNCATE = 1, 2, 4, 8, 1 << 14
HANDLED = (1 << 15) - 1
"""Every right to files of Landlock's third version (Linux 6.2)."""
DEVICES_AND_SOCKETS = 1 << 6 | 1 << 9 | 1 << 11


def give_up_files(program: str, scratch: str) -> None:
    """No file but what is needed, the program, and its scratch directory."""
    rules = ctypes.create_string_buffer(HANDLED.to_bytes(8, sys.byteorder), 8)
    if (ruleset := libc.syscall(LANDLOCK_CREATE, rules, ctypes.c_long(8), ctypes.c_long(0))) == -1:
        raise JailError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    allowed = {**dict.fromkeys([*needed(), program], EXECUTE | READ | LIST), scratch: HANDLED & ~DEVICES_AND_SOCKETS}
    allowed |= {f"/dev/{device}": READ | WRITE | TRUNCATE for device in DEVICES}
    for path, rights in allowed.items():
        there = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = Beneath(rights if os.path.isdir(path) else rights & (EXECUTE | READ | WRITE | TRUNCATE), there)
        if libc.syscall(LANDLOCK_ADD, ruleset, ctypes.c_long(1), ctypes.byref(rule), ctypes.c_long(0)) == -1:
            raise JailError(f"Landlock, {path}: {os.strerror(ctypes.get_errno())}")
        os.close(there)
    call("syscall", LANDLOCK_RESTRICT, ruleset, 0)


def give_up_capabilities() -> None:
    """Where this is root, without those of root; as new privileges are renounced, they do not come back."""
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


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
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if not request["namespaces"]:
            give_up_files(program, scratch)
        limit(request["limits"])
        give_up_capabilities()
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


def main(tell: int) -> None:
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
