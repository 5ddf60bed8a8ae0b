"""Programs that nobody has read, such as a model writes: run without network, with limits, and without a way out.

What holds them is in `jail.py` and `calls.py`: Linux namespaces with an empty read-only file system, or Landlock; a
filter of system calls; resource limits. A fault of the kernel is a way out: what must be safe from that too runs on a
machine of its own.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.errors import LongrunError

ROOT = Path(__file__).parents[2]
START = f"import sys; sys.path.append({str(ROOT)!r}); from data_pipeline.sandbox import jail; jail.main(%d)"
ISOLATIONS = ("namespaces", "landlock")
CHUNK = 2**16
GRACE_S = 5.0
"""For the pipes to close after the program's end."""


class SandboxError(LongrunError):
    """A program cannot be held here, and was not run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        wall_s: time from its start, in seconds, that of the interpreter included.
        cpu_s: processor time, in seconds.
        memory_bytes: address space; the interpreter takes about 30 MB of it.
        disk_bytes: of all its files together; they lie in memory.
        files: open at the same time.
        output_bytes: of what it prints, on both streams together.
    """

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 * 2**20
    disk_bytes: int = 16 * 2**20
    files: int = 64
    output_bytes: int = 2**20


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        code: its exit code, 128 + n where signal n killed it; None where it was stopped.
        stopped: "time" or "output", the limit that it was stopped at; empty if it ended by itself.
        stdout, stderr: what it printed, up to the limit; bytes that are no UTF-8 are replaced.
        seconds: wall time.
    """

    code: int | None
    stopped: str
    stdout: str
    stderr: str
    seconds: float


def run(program: str, stdin: str = "", limits: Limits = Limits(), isolation: str = "namespaces") -> Outcome:
    """Run the text of a Python program: one process, one thread, the standard library, an empty directory.

    Args:
        program: its source.
        stdin: what it may read.
        limits: see there.
        isolation: "namespaces"; or "landlock", for machines that allow none: then it sees which files there are, though
            not what is in them, and only each single file of its own is limited by `disk_bytes`.

    Raises:
        SandboxError: this machine cannot hold it so; it was not run.
    """
    if isolation not in ISOLATIONS:
        raise SandboxError(f"isolation={isolation}: expected one of {', '.join(ISOLATIONS)}; nothing was run.")
    with tempfile.TemporaryDirectory(prefix="longrun-sandbox-") as root:
        request = {
            "program": program,
            "stdin": stdin,
            "root": root,
            "namespaces": isolation == "namespaces",
            "limits": asdict(limits),
        }
        told, tell = os.pipe()
        with open(told, "rb") as answers:
            began = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", START % tell],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[tell],
                env={"LANG": "C.UTF-8"},
                start_new_session=True,
            )
            os.close(tell)
            try:
                printed, stopped = _followed(process, json.dumps(request).encode(), limits, began)
            finally:
                _kill(process)
            seconds = time.monotonic() - began
            answer = answers.read()
    return _outcome(answer, stopped, printed, seconds, limits)


def _outcome(answer: bytes, stopped: str, printed: dict[str, bytes], seconds: float, limits: Limits) -> Outcome:
    told: dict[str, Any] = json.loads(answer.partition(b"}")[0] + b"}") if answer else {}
    if "error" in told:
        raise SandboxError(
            f"this machine cannot hold a program that nobody has read ({told['error']}); it was not run. Allow user "
            "namespaces (user.max_user_namespaces above 0, in containers a seccomp profile with unshare and mount), "
            "Linux 5.12 or later on x86_64 or aarch64; or ask for isolation=landlock, which needs Linux 6.2 and no "
            "namespaces."
        )
    if not told and not stopped:
        raise SandboxError(f"the sandbox ended by itself: {printed['stderr'].decode(errors='replace')[-500:]}")
    text = {name: content[: limits.output_bytes].decode(errors="replace") for name, content in printed.items()}
    return Outcome(None if stopped else told["code"], stopped, text["stdout"], text["stderr"], seconds)


def _followed(
    process: subprocess.Popen[bytes], request: bytes, limits: Limits, began: float
) -> tuple[dict[str, bytes], str]:
    """What it prints until its end, or until a limit, which is named."""
    assert process.stdin and process.stdout and process.stderr
    printed = {"stdout": b"", "stderr": b""}
    with suppress(BrokenPipeError):  # it ended before; what it says of that is read below
        process.stdin.write(request)
        process.stdin.close()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, "stdout")
        selector.register(process.stderr, selectors.EVENT_READ, "stderr")
        while selector.get_map():
            left_s = began + limits.wall_s - time.monotonic()
            if left_s <= 0:
                return printed, "time"
            for key, _ in selector.select(left_s):
                content = os.read(key.fd, CHUNK)
                printed[key.data] += content
                if not content:
                    selector.unregister(key.fileobj)
            if sum(map(len, printed.values())) > limits.output_bytes:
                return printed, "output"
    left_s = max(began + limits.wall_s - time.monotonic(), 0)  # it may have closed them to go on unheard
    try:
        process.wait(left_s)
    except subprocess.TimeoutExpired:
        return printed, "time"
    return printed, ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the jail and with it all that it holds."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream
        with suppress(BrokenPipeError):  # what could not be written is of no use any more
            stream.close()
    process.wait(GRACE_S)
