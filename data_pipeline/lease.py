"""One writer per directory, also where the kernel's locks do not reach: two machines on one file system.

Each holder has a number, one above the last, and says in a file of that number that it lives. Whoever finds the newest
file still for `stale_s` takes the next number: made exclusively, so that one of many gets it. A number that is not the
newest is over for good, so a holder that was suspended, or cut off, and comes back, finds out: its thread ends the
process, and what it commits is asked about right before (`Lease.check`; a fencing token as in Kleppmann 2016, "How to
do distributed locking"). Stillness is measured by the clock of the one who looks: clocks need not agree.

    .lease/00000007     {"host": ..., "process": ..., "job": ..., "beats": 12, ...}
"""

import contextlib
import fcntl
import json
import os
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self, TextIO

from conf.errors import LongrunError

FOLDER = ".lease"
NUMBER = re.compile(r"\d{8,}")
STALE_S = 30.0
"""A holder that gives no sign for so long has lost the directory."""
BEATS = 6
"""Signs in that time."""
SERVER_S = 120.0
"""A file server may keep the kernel's lock of a machine that is gone for so long (NFS 4: 90 s, and what it takes)."""
CLOSING_S = 10.0
"""So long the end of a holder waits for a file system that takes no sign."""


class LiveRunError(LongrunError):
    """Another process is writing this directory."""


@dataclass(frozen=True)
class Holder:
    """What a holder says of itself.

    Args:
        host: its machine's name.
        machine: its running kernel: among processes of one, `flock` has the say.
        process: its id.
        job: Slurm's job, or empty.
        stale_s: seconds without a sign after which it gives the directory up.
        beats: signs so far.
        released: it has ended, as it should.
    """

    host: str
    machine: str
    process: int
    job: str
    stale_s: float
    beats: int = 0
    released: bool = False

    @classmethod
    def this(cls, stale_s: float) -> Self:
        return cls(os.uname().nodename, _machine(), os.getpid(), os.environ.get("SLURM_JOB_ID", ""), stale_s)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" + (f" (job {self.job})" if self.job else "")


def flocked(stream: TextIO, directory: Path) -> bool:
    """Take the kernel's lock of a directory; False where another process has it. That of another machine which gives no
    sign is waited for: its file server has yet to notice.

    Raises:
        OSError: the file system knows no locks.
    """
    first, began, told = _newest(directory), time.monotonic(), False
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            gone = first is not None and first.machine != _machine() and _newest(directory) == first
            if first is None or not gone or time.monotonic() - began > SERVER_S:
                return False
        if not told:
            print(f"{directory} is locked for {first}: waiting {SERVER_S:g} s for its signs or its end", flush=True)
            told = True
        time.sleep(first.stale_s / BEATS / 4)


class Lease:
    """The right to write a directory, while this process lives and no other has taken it.

    Args:
        directory: what is held; this process has its `flock`.
        stale_s: seconds without a sign of life after which others may take it.

    Raises:
        LiveRunError: another machine's process holds it; names it. Where that one gives no sign, this comes, or the
            directory is taken, after its `stale_s`.
    """

    def __init__(self, directory: Path, stale_s: float = STALE_S):
        self._folder = directory / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._holder = Holder.this(stale_s)
        self.number = self._take()
        """How often the directory was held, this time included."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """To be called right before something is put in its final place.

        Raises:
            LiveRunError: another process has taken the directory since.
        """
        newest = max(self._numbers(), default=0)
        if newest > self.number:
            who = self._read(newest) or "another process"
            raise LiveRunError(
                f"{self._folder.parent} was taken over by {who}: this one gave no sign "
                f"for {self._holder.stale_s:g} s. Was it suspended, or cut off from its files? It writes no more."
            )

    def close(self) -> None:
        """Leave the directory to the next one."""
        self._closing.set()
        self._thread.join(CLOSING_S)
        with contextlib.suppress(OSError):  # the directory may be gone
            self._write(replace(self._holder, released=True))

    def _take(self) -> int:
        while True:
            newest = max(self._numbers(), default=0)
            if newest:
                self._outwait(newest)
            try:
                with open(self._file(newest + 1), "x") as stream:
                    json.dump(asdict(self._holder), stream)
            except FileExistsError:
                continue  # another came first
            for number in self._numbers():
                if number < newest:  # the newest tells the next one who was here
                    self._file(number).unlink(missing_ok=True)
            return newest + 1

    def _outwait(self, number: int) -> None:
        """Until that holder is surely gone.

        Raises:
            LiveRunError: it is not.
        """
        first = self._read(number)
        if first and (first.released or first.machine == self._holder.machine):
            return
        who, stale_s = first or "another process", first.stale_s if first else STALE_S
        deadline = time.monotonic() + stale_s
        print(f"{self._folder.parent} was held by {who}: waiting {stale_s:g} s for its signs", flush=True)
        while time.monotonic() < deadline:
            time.sleep(stale_s / BEATS / 4)
            now = self._read(number)
            if now and now.released:
                return
            if now != first:
                raise LiveRunError(
                    f"{self._folder.parent} is being written by {now or who}. "
                    "Wait for it, stop it, or give another directory."
                )

    def _beat(self) -> None:
        beats = 0
        while not self._closing.wait(self._holder.stale_s / BEATS):
            try:
                self.check()
                beats += 1
                self._write(replace(self._holder, beats=beats))
            except LiveRunError as error:
                sys.stdout.flush()
                print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(error.exit_code)
            except OSError:
                continue  # a mount that is away: `check` has the last word

    def _numbers(self) -> list[int]:
        return _numbers(self._folder)

    def _read(self, number: int) -> Holder | None:
        return _read(self._file(number))

    def _write(self, holder: Holder) -> None:
        temporary = self._folder / f".{self.number:08d}"
        temporary.write_text(json.dumps(asdict(holder)))
        os.replace(temporary, self._file(self.number))

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:08d}"


def _numbers(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if NUMBER.fullmatch(entry.name)]


def _read(file: Path) -> Holder | None:
    """None where it cannot be read: torn, or gone."""
    try:
        return Holder(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _newest(directory: Path) -> Holder | None:
    """What the last holder of a directory said of itself."""
    folder = directory / FOLDER
    numbers = _numbers(folder) if folder.is_dir() else []
    return _read(folder / f"{max(numbers):08d}") if numbers else None


def _machine() -> str:
    """Of the running kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename
