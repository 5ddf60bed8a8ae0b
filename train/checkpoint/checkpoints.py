"""Checkpoints: a step exists on disk whole or not at all.

A save copies the tensors to host memory (the only time the loop waits) and leaves the rest to a thread: every rank
writes and syncs its own file, with a CRC-32 taken of the bytes on their way, and when torch's Distributed Checkpoint
(DCP) has gathered that all ranks are done, the first rank adds the index, the trainer's state and the checksums, syncs,
and renames the temporary directory to its final name. Names and shards are those of `Engine.state()`, so that any
layout can load it.

    checkpoints/step-00000100/rank-00000.safetensors   tensors
                              index.json               where each tensor is (train.checkpoint.storage)
                              trainer.json             step, samples, tokens, ... (train.progress.Progress)
                              checksums.json           file -> bytes, crc32
    checkpoints/.step-00000200.tmp/                    being written; removed at the next start if the run was killed
    checkpoints/step-00000300.damaged/                 passed over by a start that went on from an earlier one

CRC-32 because it is the fastest checksum of the standard library; it finds damage, not malice. What malice can do is
put other numbers there: no file is a pickle, and none that is one is opened.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from data_pipeline.artifact import write_atomically
from train.checkpoint import differences
from train.checkpoint.committed import (
    CHECKSUMS,
    INDEX,
    TRAINER,
    CheckpointError,
    FencedError,
    crc32_of,
    damage,
    damaged_of,
    path_of,
    steps,
    temporary_of,
)
from train.checkpoint.storage import Reader, Results, Writer

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(CheckpointError):
    """The file system has no room for a checkpoint."""


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method together.

    Args:
        directory: where they are; on a file system that all ranks see.
        every: steps between saves; 0 saves only when asked to.
        keep: how many committed ones are left on disk, at least 1.
        fence: called by the first rank before it commits; raises `FencedError` where this run is not to write any more.
    """

    def __init__(self, directory: Path, *, every: int, keep: int, fence: Callable[[], None] | None = None):
        self.directory = directory
        self.every = every
        self.keep = keep
        self.fence = fence
        self.stall_s = 0.0
        """Seconds that the loop waited for saves."""
        # Collectives of the writing thread must not interleave with those of the training step.
        self._group = dist.new_group(backend="gloo")
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._pending: _Save | None = None
        self._held: int | None = None
        """The step last saved or loaded. Not looked up on disk: ranks on other machines may see that late."""
        if self._rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for orphan in directory.glob(".step-*"):
                shutil.rmtree(orphan)

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def path(self, step: int) -> Path:
        return path_of(self.directory, step)

    @property
    def newest(self) -> int | None:
        """The newest committed step."""
        found = steps(self.directory)
        return found[-1] if found else None

    def save(self, step: int, state: dict[str, Tensor], trainer: Mapping[str, Any]) -> None:
        """Copy the state and return; it is written while training goes on.

        Raises:
            CheckpointError: the save before this one failed.
        """
        self.wait()
        start = time.perf_counter()
        if step != self._held:
            writer = _Commit(self.directory, step, self._rank, dict(trainer), self.keep, self.fence)
            handle: Any = dcp.async_save(
                state,
                storage_writer=writer,
                process_group=self._group,
                async_stager=self._stager,
            )
            # Some releases of torch answer with an object that also tells when the copy is done.
            needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
            self._pending = _Save(step, needed, getattr(handle, "upload_completion", handle))
            self._held = step
        self.stall_s += time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the save under way is committed.

        Raises:
            DiskFullError: there was no room for it; says what it needed and what is free.
            CheckpointError: it failed otherwise; names the newest good one.
        """
        if self._pending is None:
            return
        save, self._pending = self._pending, None
        start = time.perf_counter()
        try:
            save.future.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            self._held = None
            raise self._failure(save, error) from error
        finally:
            self.stall_s += time.perf_counter() - start

    def _failure(self, save: "_Save", error: BaseException) -> CheckpointError:
        """The error as a user reads it. What was written of the save is removed."""
        causes = _causes(error)
        good = f"The newest good checkpoint is that of step {self.newest}" if self.newest else "There is no earlier one"
        if self._rank == 0:
            shutil.rmtree(temporary_of(self.directory, save.step), ignore_errors=True)
        if fenced := next((cause for cause in causes if isinstance(cause, FencedError)), None):
            return fenced
        if any(getattr(cause, "errno", None) in NO_ROOM for cause in causes):
            free = shutil.disk_usage(self.directory).free
            return DiskFullError(
                f"no room for the checkpoint of step {save.step} in {self.directory}: over {save.bytes / 1e6:.1f} MB "
                f"needed, {free / 1e6:.1f} MB free. {good}. Make room, then start the same command again."
            )
        return CheckpointError(f"the checkpoint of step {save.step} was not written: {_said(error)}. {good}.")

    def restore(
        self, state: dict[str, Tensor], check: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any] | None:
        """Overwrite the tensors of `state` in place with those of the newest checkpoint that verifies. Newer ones are
        set aside, so that they neither stand in the way of their step nor count among those that are kept.

        Args:
            state: the live tensors.
            check: is given the trainer's state before a tensor is read; raises where it is not to be gone on with.

        Returns:
            The trainer's state saved with them; None where there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, but each one is damaged or holds another model.
        """
        found = [steps(self.directory)]
        dist.broadcast_object_list(found, group=self._group)  # directories may not look the same everywhere
        passed_over: list[str] = []
        for step in reversed(found[0]):
            checkpoint = self.path(step)
            reasons = self._gather(damage(checkpoint, self._rank, self._ranks))
            if not reasons:
                reader, trainer, problems = _opened(checkpoint)
                reasons = self._gather(problems)
            if not reasons:
                if check is not None:
                    check(trainer)
                reasons = self._load(reader, state)
            if not reasons:
                self._set_aside([newer for newer in found[0] if newer > step])
                self._held = step
                return trainer
            passed_over.append(f"{checkpoint.name}: {'; '.join(reasons)}")
            if self._rank == 0:
                print(f"checkpoint passed over: {passed_over[-1]}", flush=True)
        if passed_over:
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be read:\n  " + "\n  ".join(passed_over) + "\n"
                "Put a good copy back, or remove the directory to train from the start."
            )
        return None

    def _set_aside(self, damaged: list[int]) -> None:
        for step in damaged if self._rank == 0 else []:
            aside = damaged_of(self.directory, step)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.path(step), aside)
            print(f"{self.path(step).name} is now {aside.name}: remove it once it is of no use", flush=True)

    def _gather(self, mine: list[str]) -> list[str]:
        gathered: list[list[str]] = [[] for _ in range(self._ranks)]
        dist.all_gather_object(gathered, mine, group=self._group)
        return sorted({reason for reasons in gathered for reason in reasons})

    def _load(self, reader: Reader, state: dict[str, Tensor]) -> list[str]:
        """Overwrite the state. Returns what kept it from being read: the same on all ranks.

        Raises:
            CheckpointError: it is the state of another model.
        """
        stored = reader.read_metadata().state_dict_metadata
        if differing := self._differing({n: tuple(getattr(entry, "size", ())) for n, entry in stored.items()}, state):
            raise CheckpointError(
                f"{reader.directory} holds the state of another run:\n  " + "\n  ".join(differing) + "\n"
                "Give the configuration it was written with, or another run_dir."
            )
        try:
            dcp.load(state, storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            return [f"its tensors cannot be read: {_said(error)}"]
        return []

    def _differing(self, stored: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
        """What keeps a checkpoint from being this run's, in lines. A rank of a pipeline has some of the names only, so
        the ranks' are put together."""
        names = sorted(stored)
        taken = torch.tensor([name in state for name in names], dtype=torch.uint8)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=self._group)
        there = {name for name, some_rank in zip(names, taken.tolist(), strict=True) if not some_rank}
        here = set(self._gather([name for name in state if name not in stored]))
        reshaped = differences.reshaped(stored, {name: tuple(tensor.shape) for name, tensor in state.items()})
        return [
            *differences.only("there", there),
            *differences.only("here", here),
            *differences.shown(self._gather(reshaped)),
        ]

    def close(self) -> None:
        """Let a save under way come to its end, whichever, and let go of the host copies."""
        if self._pending is not None:
            wait([self._pending.future])
        self._stager.close()


def _opened(checkpoint: Path) -> tuple[Reader, dict[str, Any], list[str]]:
    """The index, the trainer's state, and what kept either from being read."""
    reader = Reader(checkpoint)
    try:
        reader.read_metadata()
        return reader, dict(json.loads((checkpoint / TRAINER).read_text())), []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return reader, {}, [f"{INDEX} or {TRAINER} cannot be read: {error}"]


def _causes(error: BaseException) -> list[BaseException]:
    """What went wrong on the ranks that DCP tells of."""
    return [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]


def _said(error: BaseException) -> str:
    return "; ".join(sorted({str(cause) for cause in _causes(error)}))


@dataclass(frozen=True)
class _Save:
    """A save under way: `bytes` over all ranks, `future` done when it is committed."""

    step: int
    bytes: int
    future: Future


def _record(file: Path) -> dict[str, int]:
    return {"bytes": file.stat().st_size, "crc32": crc32_of(file)}


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Commit(Writer):
    """DCP's writer, ended by a commit: `finish` is called on the first rank once all others are done."""

    def __init__(
        self,
        directory: Path,
        step: int,
        rank: int,
        trainer: dict[str, Any],
        keep: int,
        fence: Callable[[], None] | None,
    ):
        super().__init__(temporary_of(directory, step), rank)
        self.final = path_of(directory, step)
        self.trainer = trainer
        self.keep = keep
        self.fence = fence

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        write_atomically(self.directory / TRAINER, json.dumps(self.trainer))
        checksums = {name: _record(self.directory / name) for name in (INDEX, TRAINER)}
        for written in results:
            assert isinstance(written, Results)
            checksums.update(written.files)
        write_atomically(self.directory / CHECKSUMS, json.dumps(checksums, indent=1))  # syncs the directory, too
        if self.fence is not None:
            self.fence()
        os.replace(self.directory, self.final)
        _sync(self.final.parent)
        self._retire()

    def _retire(self) -> None:
        """Remove the oldest, under a name that nobody takes for a checkpoint while it goes."""
        directory = self.final.parent
        for step in steps(directory)[: -self.keep]:
            doomed = directory / f".{path_of(directory, step).name}.old"
            os.replace(path_of(directory, step), doomed)
            shutil.rmtree(doomed)
