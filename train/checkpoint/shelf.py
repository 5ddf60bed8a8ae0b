"""The directory of a run's checkpoints: what is put there, and what is taken away."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from train.checkpoint.committed import CheckpointError, FencedError, path_of, steps


class VanishedError(CheckpointError):
    """The directory of the checkpoints is not there any more."""


@dataclass
class Shelf:
    """Committed checkpoints, whole ones only.

    Args:
        directory: where they are; on a file system that all ranks see.
        token: what this run's unfinished saves are called by, the same on all ranks: should a run that was taken over
            still write, it writes beside the other's.
        keep: how many are left there, at least 1.
        keep_every: those of steps that it divides are left there for good; 0: none.
        fence: called before a commit; raises `FencedError` where this run is not to write any more.
    """

    directory: Path
    token: str
    keep: int
    keep_every: int = 0
    fence: Callable[[], None] | None = None
    _place: tuple[int, int] = field(init=False, default=(0, 0))
    """Which directory it is."""
    _put: tuple[int, int] = field(init=False, default=(0, 0))
    """Which one was committed last."""

    def clear(self) -> list[str]:
        """Make the directory, and remove what saves left that were cut off. Returns what is in the way."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for orphan in sorted(self.directory.glob(".step-*")):
                shutil.rmtree(orphan)
                print(f"removed {orphan.name}: cut off by the end of an earlier process", flush=True)
        except OSError as error:
            return [str(error)]
        return []

    def enter(self, rank: int) -> list[str]:
        """Try to write there, and keep in mind which directory it is. Returns what keeps this rank from it."""
        probe = self.directory / f".step-probe-{rank}"
        try:
            probe.mkdir()
            probe.rmdir()
            self._place = _identity(self.directory)
        except OSError as error:
            return [f"rank {rank}: {error.strerror}"]
        return []

    def check(self) -> None:
        """See that the directory is still that one: where a file system was taken away, there may be one of its name
        below.

        Raises:
            VanishedError: it is not.
        """
        try:
            there = _identity(self.directory)
        except OSError:
            there = None
        if there != self._place:
            raise VanishedError(f"{self.directory} has vanished: unmounted, moved or removed")

    def temporary(self, step: int) -> Path:
        """Where a step is while it is being written."""
        return self.directory / f".step-{step:08d}.{self.token}.tmp"

    def put(self, step: int) -> None:
        """Commit what is whole, and synced, in `temporary`. No step that is there is replaced: a process that sleeps
        anywhere in here may wake up among those of the run that took over.

        Raises:
            VanishedError: see `check`.
            FencedError: see `fence`; or the step is there, and not of this process.
        """
        self.check()
        self._ask()
        temporary, final = self.temporary(step), path_of(self.directory, step)
        if not final.exists():
            put = _identity(temporary)
            os.replace(temporary, final)  # refused where there is a step of that name by now
            self._put = put
        elif _identity(final) != self._put:
            self._ask()
            raise FencedError(f"{final} is there, and this run did not write it: another one writes {self.directory}.")
        else:  # all was well but for the sync below, or the word of it to the other ranks
            shutil.rmtree(temporary)
        sync(self.directory)
        self._retire()

    def _ask(self) -> None:
        if self.fence is not None:
            self.fence()

    def _retire(self) -> None:
        """Remove the oldest. What was put there is committed: an error here is none of its."""
        for step in steps(self.directory)[: -self.keep]:
            if self.keep_every == 0 or step % self.keep_every:
                try:
                    self._ask()
                    _remove(path_of(self.directory, step))
                except OSError as error:
                    print(f"{path_of(self.directory, step)} should go, and cannot be removed: {error}", flush=True)


def _remove(checkpoint: Path) -> None:
    """Under a name that nobody takes for a checkpoint while it goes."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _identity(directory: Path) -> tuple[int, int]:
    """The same for the same directory, under any name."""
    status = directory.stat()
    return status.st_dev, status.st_ino


def sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
