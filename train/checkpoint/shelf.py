"""The directory of a run's checkpoints: what is put there, and what is taken away."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from train.checkpoint.committed import CheckpointError, path_of, steps


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
    _inode: int = field(init=False, default=0)

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
            self._inode = self.directory.stat().st_ino
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
            there = self.directory.stat().st_ino
        except OSError:
            there = None
        if there != self._inode:
            raise VanishedError(f"{self.directory} has vanished: unmounted, moved or removed")

    def temporary(self, step: int) -> Path:
        """Where a step is while it is being written."""
        return self.directory / f".step-{step:08d}.{self.token}.tmp"

    def put(self, step: int) -> None:
        """Commit what is whole, and synced, in `temporary`.

        Raises:
            VanishedError: see `check`.
            FencedError: see `fence`.
        """
        self.check()
        if self.fence is not None:
            self.fence()
        final = path_of(self.directory, step)
        if final.exists():  # the sync below failed when it was committed
            _remove(final)
        os.replace(self.temporary(step), final)
        sync(self.directory)
        self._retire()

    def _retire(self) -> None:
        """Remove the oldest. What was put there is committed: an error here is none of its."""
        for step in steps(self.directory)[: -self.keep]:
            if self.keep_every == 0 or step % self.keep_every:
                try:
                    _remove(path_of(self.directory, step))
                except OSError as error:
                    print(f"{path_of(self.directory, step)} should go, and cannot be removed: {error}", flush=True)


def _remove(checkpoint: Path) -> None:
    """Under a name that nobody takes for a checkpoint while it goes."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
