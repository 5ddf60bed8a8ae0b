"""Saves under way: how one is written and committed, and what went wrong with it, as a user reads it."""

import errno
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from data_pipeline.artifact import write_atomically
from train.checkpoint.committed import (
    CHECKSUMS,
    INDEX,
    TRAINER,
    CheckpointError,
    FencedError,
    crc32_of,
    path_of,
)
from train.checkpoint.shelf import Shelf, VanishedError
from train.checkpoint.storage import Results, Writer

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(CheckpointError):
    """The file system has no room for a checkpoint."""


class Commit(Writer):
    """DCP's writer, ended by a commit: `finish` is called on the first rank once all others are done."""

    def __init__(self, shelf: Shelf, step: int, rank: int, trainer: Mapping[str, Any]):
        super().__init__(shelf.temporary(step), rank)
        self.shelf = shelf
        self.step = step
        self.trainer = dict(trainer)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.shelf.check()
        super().set_up_storage_writer(is_coordinator)

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        write_atomically(self.directory / TRAINER, json.dumps(self.trainer))
        checksums = {name: record(self.directory / name) for name in (INDEX, TRAINER)}
        for written in results:
            assert isinstance(written, Results)
            checksums.update(written.files)
        write_atomically(self.directory / CHECKSUMS, json.dumps(checksums, indent=1))  # syncs the directory, too
        self.shelf.put(self.step)


def record(file: Path) -> dict[str, int]:
    """What is noted of a file in checksums.json."""
    return {"bytes": file.stat().st_size, "crc32": crc32_of(file)}


@dataclass(frozen=True)
class Save:
    """A save under way.

    Args:
        step: of the state.
        bytes: of this rank's tensors.
        directory: where it will be committed.
        good: the newest step that is there already.
        future: done when it is committed, or has failed.
        settled: set when it is done and, where it failed, cleared away and told of.
    """

    step: int
    bytes: int
    directory: Path
    good: int | None
    future: Future
    settled: Event = field(default_factory=Event)

    def failure(self) -> CheckpointError | None:
        """What went wrong, once it is at its end."""
        error = self.future.exception()
        if error is None:
            return None
        causes = causes_of(error)
        if fenced := next((cause for cause in causes if isinstance(cause, FencedError)), None):
            return fenced
        earlier = "There is no earlier one."
        if self.good is not None:
            earlier = f"The newest good one is that of step {self.good}: {path_of(self.directory, self.good)}."
        if vanished := next((cause for cause in causes if isinstance(cause, VanishedError)), None):
            return VanishedError(f"the checkpoint of step {self.step} was not written: {vanished}. {earlier}")
        if any(getattr(cause, "errno", None) in NO_ROOM for cause in causes):
            free = shutil.disk_usage(self.directory).free
            return DiskFullError(
                f"no room for the checkpoint of step {self.step} in {self.directory}: over {self.bytes / 1e6:.1f} MB "
                f"needed, {free / 1e6:.1f} MB free. {earlier}"
            )
        return CheckpointError(f"the checkpoint of step {self.step} was not written: {said(error)}. {earlier}")


def final(error: CheckpointError) -> CheckpointError:
    """The failure that ends a run, with what is to be done about it, where something is."""
    if isinstance(error, FencedError):
        return error
    fix = "Make room" if isinstance(error, DiskFullError) else "Mend that"
    return type(error)(f"{error} {fix}, then start the same command again.")


def causes_of(error: BaseException) -> list[BaseException]:
    """What went wrong on the ranks that DCP tells of."""
    return [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]


def said(error: BaseException) -> str:
    return "; ".join(sorted({str(cause) or repr(cause) for cause in causes_of(error)}))
