"""Checkpoints: a step exists on disk whole or not at all.

A save copies the tensors to host memory (the only time the loop waits) and leaves the rest to a thread: every rank
writes and syncs its own file through torch's Distributed Checkpoint (DCP), reads it back for a CRC-32, and when DCP has
gathered that all ranks are done, the first rank adds the trainer's state and the checksums, syncs, and renames the
temporary directory to its final name. Names and shards are those of `Engine.state()`, so that any layout can load it.

    checkpoints/step-00000100/.metadata          what is where (DCP)
                              __<rank>_0.distcp  tensors
                              trainer.json       step, samples, tokens, ... (train.progress.Progress)
                              checksums.json     file -> bytes, crc32
    checkpoints/.step-00000200.tmp/              being written; removed at the next start if the run was killed
    checkpoints/step-00000300.damaged/           passed over by a start that went on from an earlier one

CRC-32 because it is the fastest checksum of the standard library; it finds damage, not malice: a checkpoint is as
trusted as the machine that holds it.
"""

import errno
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.futures
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from conf.errors import LongrunError
from data_pipeline.artifact import write_atomically

CHECKSUMS = "checksums.json"
TRAINER = "trainer.json"
NAME = re.compile(r"step-(\d{8,})")
MODEL = "model."
"""What parameters' names begin with."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(LongrunError):
    """A checkpoint cannot be written, or none of those on disk can be read."""


class DiskFullError(CheckpointError):
    """The file system has no room for a checkpoint."""


def steps(directory: Path) -> list[int]:
    """The steps with a committed checkpoint, oldest first."""
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def damaged_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.damaged"


def temporary_of(directory: Path, step: int) -> Path:
    return directory / f".step-{step:08d}.tmp"


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files: missing, of another size, or of another checksum.

    Args:
        part: which share of the files to look at, so that `parts` ranks can divide them.
    """
    try:
        recorded: dict[str, dict[str, int]] = json.loads((checkpoint / CHECKSUMS).read_text())
        names = sorted(recorded)
        found = []
        for name in names[part::parts]:
            file = checkpoint / name
            if not file.exists():
                found.append(f"{name} is missing")
            elif (size := file.stat().st_size) != recorded[name]["bytes"]:
                found.append(f"{name} has {size} bytes, {recorded[name]['bytes']} were written")
            elif crc32_of(file) != recorded[name]["crc32"]:
                found.append(f"{name} has another checksum than when it was written")
        return found if {".metadata", TRAINER} <= set(names) else [*found, f"{CHECKSUMS} is incomplete"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS} cannot be read: {error}"]


def crc32_of(file: Path) -> int:
    value = 0
    buffer = memoryview(bytearray(1 << 22))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return value


def _record(file: Path) -> dict[str, int]:
    return {"bytes": file.stat().st_size, "crc32": crc32_of(file)}


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method together.

    Args:
        directory: where they are; on a file system that all ranks see.
        every: steps between saves; 0 saves only when asked to.
        keep: how many committed ones are left on disk, at least 1.
    """

    def __init__(self, directory: Path, *, every: int, keep: int):
        self.directory = directory
        self.every = every
        self.keep = keep
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
            writer = _Writer(self.directory, step, dict(trainer), self.keep)
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
            raise self._failure(save, error) from error
        finally:
            self.stall_s += time.perf_counter() - start

    def _failure(self, save: "_Save", error: BaseException) -> CheckpointError:
        """The error as a user reads it. What was written of the save is removed."""
        causes = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        reason = "; ".join(sorted({str(cause) for cause in causes}))
        good = f"The newest good checkpoint is that of step {self.newest}" if self.newest else "There is no earlier one"
        # torch's zip writer hides the error number of a failed write, so a disk that is full now counts, too.
        full = any(getattr(cause, "errno", None) in NO_ROOM for cause in causes)
        full = full or shutil.disk_usage(self.directory).free < save.bytes
        if self._rank == 0:
            shutil.rmtree(temporary_of(self.directory, save.step), ignore_errors=True)
        if full:
            free = shutil.disk_usage(self.directory).free
            return DiskFullError(
                f"no room for the checkpoint of step {save.step} in {self.directory}: over {save.bytes / 1e6:.1f} MB "
                f"needed, {free / 1e6:.1f} MB free. {good}. Make room, then start the same command again."
            )
        return CheckpointError(f"the checkpoint of step {save.step} was not written: {reason}. {good}.")

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
                trainer = json.loads((checkpoint / TRAINER).read_text())
                if check is not None:
                    check(trainer)
                self._load(checkpoint, state)
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

    def _load(self, checkpoint: Path, state: dict[str, Tensor]) -> None:
        reader = dcp.FileSystemReader(checkpoint)
        stored = reader.read_metadata().state_dict_metadata
        differing = self._differing({name: tuple(getattr(entry, "size", ())) for name, entry in stored.items()}, state)
        if differing:
            raise CheckpointError(
                f"{checkpoint} holds the state of another run:\n  " + "\n  ".join(differing) + "\n"
                "Give the configuration it was written with, or another run_dir."
            )
        dcp.load(state, storage_reader=reader, process_group=self._group)

    def _differing(self, stored: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
        """What keeps a checkpoint from being this run's, in lines. A rank of a pipeline has some of the names only, so
        the ranks' are put together."""
        names = sorted(stored)
        taken = torch.tensor([name in state for name in names], dtype=torch.uint8)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=self._group)
        there = {name for name, some_rank in zip(names, taken.tolist(), strict=True) if not some_rank}
        here = set(self._gather([name for name in state if name not in stored]))
        shapes = [(name, stored[name], tuple(tensor.shape)) for name, tensor in state.items() if name in stored]
        reshaped = self._gather([f"{n}: {list(old)} there, {list(new)} here" for n, old, new in shapes if old != new])
        parameters = [line for line in reshaped if line.startswith(MODEL)] or reshaped  # moments have their shapes
        return [*_only("there", there), *_only("here", here), *_some(parameters)]

    def close(self) -> None:
        """Let a save under way come to its end, whichever, and let go of the host copies."""
        if self._pending is not None:
            wait([self._pending.future])
        self._stager.close()


def _only(where: str, names: set[str]) -> list[str]:
    """Names that only one side has, in lines; what belongs to a parameter goes without saying."""
    parameters = {name.removeprefix(MODEL) for name in names if name.startswith(MODEL)}
    moments, averages, others = set(), set(), set()
    for name in names:
        kind, _, rest = name.partition(".")
        parameter, _, moment = rest.rpartition(".")
        if kind == "optimizer" and parameter not in parameters:
            moments.add(moment)
        elif kind == "ema" and rest not in parameters:
            averages.add(rest)
        elif kind not in ("model", "optimizer", "ema"):
            others.add(name)
    lines = [f"parameters only {where}: {', '.join(_some(parameters))}"] if parameters else []
    if moments:
        lines.append(f"moments only {where}, of another optimizer: {', '.join(sorted(moments))}")
    if averages:
        lines.append(f"averaged weights only {where} (stage.ema): {', '.join(_some(averages))}")
    return [*lines, f"only {where}: {', '.join(_some(others))}"] if others else lines


def _some(names: Iterable[str], count: int = 4) -> list[str]:
    ordered = sorted(names)
    return ordered if len(ordered) <= count else [*ordered[:count], f"and {len(ordered) - count} more"]


@dataclass(frozen=True)
class _Save:
    """A save under way: `bytes` over all ranks, `future` done when it is committed."""

    step: int
    bytes: int
    future: Future


class _Results(list[WriteResult]):
    """What one rank wrote, with the checksums of its files."""

    files: dict[str, dict[str, int]]


class _Writer(dcp.FileSystemWriter):
    """DCP's file writer, ended by a commit.

    DCP calls `write_data` on every rank, gathers the results or the errors of all, and calls `finish` on the first rank
    only if all went well: the place to rename.
    """

    def __init__(self, directory: Path, step: int, trainer: dict[str, Any], keep: int):
        self.temporary = temporary_of(directory, step)
        self.final = path_of(directory, step)
        self.trainer = trainer
        self.keep = keep
        super().__init__(self.temporary, sync_files=True)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        checked = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # ours covers the whole file
        try:
            results = _Results(super().write_data(plan, planner).wait())
            results.files = {n: _record(self.temporary / n) for n in {r.storage_data.relative_path for r in results}}
        finally:
            torch.serialization.set_crc32_options(checked)
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        write_atomically(self.temporary / TRAINER, json.dumps(self.trainer))
        checksums = {name: _record(self.temporary / name) for name in (".metadata", TRAINER)}
        for written in results:
            assert isinstance(written, _Results)
            checksums.update(written.files)
        write_atomically(self.temporary / CHECKSUMS, json.dumps(checksums, indent=1))  # syncs the directory, too
        os.replace(self.temporary, self.final)
        _sync(self.final.parent)
        self._retire()

    def _retire(self) -> None:
        """Remove the oldest, under a name that nobody takes for a checkpoint while it goes."""
        directory = self.final.parent
        for step in steps(directory)[: -self.keep]:
            doomed = directory / f".{path_of(directory, step).name}.old"
            os.replace(path_of(directory, step), doomed)
            shutil.rmtree(doomed)
