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
    checkpoints/.step-00000200.<run>.tmp/              being written; removed at the next start if the run was killed
    checkpoints/step-00000300.damaged/                 passed over by a start that went on from an earlier one

CRC-32 because it is the fastest checksum of the standard library; it finds damage, not malice. What malice can do is
put other numbers there: no file is a pickle, and none that is one is opened.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from train.checkpoint import differences
from train.checkpoint.committed import (
    INDEX,
    TRAINER,
    CheckpointError,
    FencedError,
    damage,
    damaged_of,
    path_of,
    steps,
)
from train.checkpoint.saves import Commit, DiskFullError, Save, final, said
from train.checkpoint.shelf import Shelf, VanishedError
from train.checkpoint.storage import Reader

KINDS = {kind.__name__: kind for kind in (CheckpointError, DiskFullError, FencedError, VanishedError)}
"""Of errors that a rank tells the others."""
SLOW_S = 1.0
"""A wait of the loop for the disk that is worth a word."""


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method together.

    A save that fails is told at once, and made up for by the next: training goes on, as what is on disk stays there.

    Args:
        directory: where they are; on a file system that all ranks see.
        every: steps between saves; 0 saves only when asked to.
        keep: how many committed ones are left on disk, at least 1.
        keep_every: those of steps that it divides are left there for good; 0: none.
        max_failed: saves in a row that may fail (`failures.save_retries`).
        fence: called by the first rank before it commits; raises `FencedError` where this run is not to write any more.

    Raises:
        CheckpointError: some rank cannot write there; names the first, and why.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every: int,
        keep: int,
        keep_every: int = 0,
        max_failed: int = 0,
        fence: Callable[[], None] | None = None,
    ):
        self.directory = directory
        self.every = every
        self.max_failed = max_failed
        self.alert: Callable[[str, str], None] = lambda kind, text: None
        """Told what goes wrong: kind ("fault", "stall") and text. Called from any thread, of the first rank."""
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
        self._pending: Save | None = None
        self._held: int | None = None
        """The step last saved or loaded. Not looked up on disk: ranks on other machines may see that late."""
        self._good: int | None = None
        """The step last committed or loaded."""
        self._failed = 0
        """Saves since then."""
        self._told_s = SLOW_S
        [token] = self._gather([f"{time.time_ns():x}"] if self._rank == 0 else [])
        self._shelf = Shelf(directory, token, keep, keep_every, fence)
        reasons = self._gather(self._shelf.clear() if self._rank == 0 else [])
        if reasons := reasons or self._gather(self._shelf.enter(self._rank)):
            raise CheckpointError(
                f"no checkpoint can be written to {directory}: {'; '.join(reasons)}. Is its file system mounted, and "
                "not read-only? Mend that, or give another run_dir."
            )

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
        """Copy the state and return; it is written while training goes on. Waits for the save before, if it must.

        Raises:
            CheckpointError: the save before failed, too often in a row; see `wait`.
        """
        self.wait()
        start = time.perf_counter()
        if step != self._held:
            handle: Any = dcp.async_save(
                state,
                storage_writer=Commit(self._shelf, step, self._rank, trainer),
                process_group=self._group,
                async_stager=self._stager,
            )
            # Some releases of torch answer with an object that also tells when the copy is done.
            future = getattr(handle, "upload_completion", handle)
            needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
            self._pending = save = Save(step, needed, self.directory, self._good, future)
            self._held = step
            future.add_done_callback(lambda _: self._settle(save))
        self.stall_s += time.perf_counter() - start

    def wait(self) -> bool:
        """Wait for the end of the save under way. Returns whether it is committed, or there was none.

        Raises:
            FencedError: another run has taken over the directory.
            DiskFullError: there was no room for it, too often in a row; says what it needed and what is free.
            CheckpointError: it failed otherwise, too often in a row; names the newest good one.
        """
        start = time.perf_counter()
        error = self._outcome()
        self.stall_s += time.perf_counter() - start
        if error is not None and (self._failed > self.max_failed or isinstance(error, FencedError)):
            raise final(error)
        return error is None

    def _outcome(self) -> CheckpointError | None:
        """What became of the save under way, once it is at its end."""
        if self._pending is None:
            return None
        save, self._pending = self._pending, None
        self._await(save)
        error = self._agreed(save.failure())
        if error is None:
            self._good, self._failed = save.step, 0
            return None
        self._held, self._failed = None, self._failed + 1
        if self._ranks > 1:  # a connection of it may be what broke, and gloo mends none
            dist.destroy_process_group(self._group)
            self._group = dist.new_group(backend="gloo")
        return error

    def _agreed(self, mine: CheckpointError | None) -> CheckpointError | None:
        """What all ranks go by: where the last exchange of a save breaks, to some it went well and to others not."""
        failed = torch.tensor(mine is not None, dtype=torch.int32)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if not failed:
            return None
        told: list[tuple[str, str] | None] = [None] * self._ranks
        dist.all_gather_object(told, (type(mine).__name__, str(mine)) if mine else None)
        errors = [KINDS[kind](text) for kind, text in filter(None, told)]
        return next((error for error in errors if isinstance(error, FencedError)), errors[0])

    def _await(self, save: Save) -> None:
        """Wait for the end of a save. A disk that is too slow for `every` is told: again when it is twice as slow."""
        start = time.perf_counter()
        while not save.settled.wait(self._told_s):
            waited = time.perf_counter() - start
            self._told_s = 2 * waited
            self._tell(
                "stall",
                f"training has waited {waited:.0f} s for the disk: the checkpoint of step {save.step} is still being "
                f"written to {self.directory}. Raise stage.checkpoint_every, or find out why it is slow.",
            )

    def _settle(self, save: Save) -> None:
        """Once a save is at its end, on whichever thread that was: make room again where it failed, and say so."""
        try:
            if (error := save.failure()) is not None and self._rank == 0:
                shutil.rmtree(self._shelf.temporary(save.step), ignore_errors=True)
                goes_on = "" if isinstance(error, FencedError) else " Training goes on; the next save makes up for it."
                self._tell("fault", f"{error}{goes_on}")
        finally:
            save.settled.set()

    def _tell(self, kind: str, text: str) -> None:
        if self._rank == 0:
            print(text, flush=True)
            self.alert(kind, text)

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
                reader, trainer, problems = _opened(checkpoint, step)
                reasons = self._gather(problems)
            if not reasons:
                if check is not None:
                    check(trainer)
                reasons = self._load(reader, state)
            if not reasons:
                self._set_aside([newer for newer in found[0] if newer > step])
                self._held = self._good = step
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
            return [f"its tensors cannot be read: {said(error)}"]
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
            self._await(self._pending)
        self._stager.close()


def _opened(checkpoint: Path, step: int) -> tuple[Reader, dict[str, Any], list[str]]:
    """The index, the trainer's state, and what kept either from being read."""
    reader = Reader(checkpoint)
    try:
        reader.read_metadata()
        trainer = dict(json.loads((checkpoint / TRAINER).read_text()))
        other = [f"it is that of step {trainer['step']}"] if trainer.get("step", step) != step else []
        return reader, trainer, other
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return reader, {}, [f"{INDEX} or {TRAINER} cannot be read: {error}"]
