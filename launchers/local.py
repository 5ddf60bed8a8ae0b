"""Ranks as processes of this machine.

torchrun is not used because it loses what the lifecycle lives by: a worker's exit code 75 comes out of it as 1, and
the first rank that ends with 75 makes it kill those that are still writing the last checkpoint. The variables that
the ranks find each other by are torchrun's.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.errors import Problem
from conf.registry import register
from launchers.base import DONE, LOST, STOPPED_EARLY, Ended, Output

PR_SET_PDEATHSIG = 1  # prctl(2)
LAST_WORDS_S = 2.0
"""How long the output of ended ranks is waited for: a process they left behind may hold the pipe for ever."""
_libc = ctypes.CDLL(None, use_errno=True)


@register("launcher", "local")
@dataclass(frozen=True)
class Local:
    """Start every rank on this machine.

    Args:
        threads: CPU threads of each process; 0 shares out the cores this process may use.
        devices: the GPUs that are used, as in CUDA_VISIBLE_DEVICES; empty for all.
        grace_s: seconds the other ranks have to end by themselves after one has; then they are killed.
    """

    threads: int = 0
    devices: str = ""
    grace_s: float = 120.0

    def problems(self) -> list[Problem]:
        found = (
            [] if self.threads >= 0 else [Problem("launcher.threads", self.threads, "0 (share out the cores) or more")]
        )
        if self.grace_s <= 0:
            found.append(Problem("launcher.grace_s", self.grace_s, "a number of seconds above 0"))
        return found

    def parts(self, count: int, processes: int) -> list["Local"]:
        """This machine for so many stages at the same time, of so many processes each: every one has its share of the
        cores, and GPUs of its own where there are enough."""
        threads = self.threads or max(1, len(os.sched_getaffinity(0)) // (count * processes))
        given = self.devices or os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = (",".join(map(str, range(_gpus()))) if given is None else given).split(",")
        each = max(1, len(gpus) // count)
        shares = [",".join(gpus[part * each % len(gpus) :][:each]) for part in range(count)]
        return [replace(self, threads=threads, devices=share) for share in shares]

    def start(self, command: Sequence[str], processes: int, output: Output) -> "LocalProcesses":
        threads = self.threads or max(1, len(os.sched_getaffinity(0)) // processes)
        port = _free_port()
        ranks: list[subprocess.Popen[str]] = []
        readers: list[threading.Thread] = []
        for rank in range(processes):
            environment = dict(os.environ, PYTHONUNBUFFERED="1")
            environment.setdefault("OMP_NUM_THREADS", str(threads))
            if self.devices:
                environment["CUDA_VISIBLE_DEVICES"] = self.devices
            if processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            ranks.append(_start([sys.executable, "-m", *command], environment))
            readers.append(threading.Thread(target=_forward, args=(ranks[-1], rank, output), daemon=True))
            readers[-1].start()
        return LocalProcesses(ranks, readers, self.grace_s)


@dataclass
class LocalProcesses:
    """The ranks of one stage."""

    ranks: list[subprocess.Popen[str]]
    readers: list[threading.Thread]
    grace_s: float
    first_end_s: float | None = None
    last_end_s: float | None = None
    failed: list[int] = field(default_factory=list)

    def poll(self) -> Ended | None:
        codes = [rank.poll() for rank in self.ranks]
        for rank, code in enumerate(codes):
            if code not in (None, DONE, STOPPED_EARLY) and rank not in self.failed:
                self.failed.append(rank)
        if any(code is not None for code in codes) and self.first_end_s is None:
            self.first_end_s = time.monotonic()
        if None in codes:
            # The others wait in a collective for a rank that is gone, or write the last checkpoint.
            late = self.first_end_s is not None and time.monotonic() - self.first_end_s > self.grace_s
            if late:
                self.failed += [rank for rank, code in enumerate(codes) if code is None and rank not in self.failed]
                self.kill()
            return None
        if self.last_end_s is None:
            self.last_end_s = time.monotonic()
        if any(reader.is_alive() for reader in self.readers) and time.monotonic() - self.last_end_s < LAST_WORDS_S:
            return None  # what it said last, often why it failed, is still in the pipe
        if self.failed:
            self.kill()  # what the ranks themselves started
            return _failure({rank: codes[rank] or 0 for rank in self.failed}, len(codes))
        return Ended(STOPPED_EARLY if STOPPED_EARLY in codes else DONE)

    def stop(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        for rank in self.ranks:
            try:
                os.killpg(rank.pid, signal.SIGKILL)  # each leads its own process group
            except ProcessLookupError:
                continue


def _failure(codes: dict[int, int], processes: int) -> Ended:
    """A rank's own error before the signal that killed one, and both before what the others then said of it.

    Args:
        codes: rank -> exit code, the first to end first.
    """
    rank = min(codes, key=lambda rank: (codes[rank] == LOST, codes[rank] < 0))
    code, who = codes[rank], "it" if processes == 1 else f"rank {rank} of {processes}"
    if code >= 0:
        return Ended(code, f"{who} exited with code {code}")
    hint = "; is there enough memory?" if -code == signal.SIGKILL else ""
    return Ended(LOST, f"{who} was killed by {signal.Signals(-code).name}{hint}")


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C reaches the lifecycle alone, which passes it on once
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    """A lifecycle that was killed leaves no rank behind that holds the run directory."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _forward(process: subprocess.Popen[str], rank: int, output: Output) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        output(rank, line.rstrip("\n"))


def _gpus() -> int:
    """How many of NVIDIA's devices are here. CUDA counts them from 0, also where a container has but some of them,
    under the machine's numbers."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
