"""What a checkpoint costs: the stall of the loop, and the speed of the save against the disk's own.

The disk is measured in the same run, before and after each save, by writing as many bytes and syncing them: disks
vary from second to second, so only the ratio means much.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from conf.registry import register
from parallel import distributed
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.committed import damage


@register("bench", "checkpoint")
@dataclass(frozen=True)
class CheckpointBench:
    """Save a state while a loop computes, and load it again.

    Args:
        megabytes: size of the state, in MB of fp32 tensors.
        saves: number of saves; the first also allocates the host copy.
        directory: where to write; empty for the system's temporary directory.
        matrix: rows of the square products that stand for training.
    """

    megabytes: int = 400
    saves: int = 4
    directory: str = ""
    matrix: int = 512

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it."""
        distributed.start()
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.directory or None) as name:
            return self._measure(Path(name))

    def _measure(self, directory: Path) -> dict[str, float]:
        state = {f"model.{i}": torch.randn(1024, 1024) for i in range(max(1, self.megabytes * 10**6 // 2**22))}
        megabytes = sum(tensor.nbytes for tensor in state.values()) / 1e6
        checkpoints = Checkpoints(directory / "checkpoints", every=1, keep=1)
        alone = statistics.median(self._step() for _ in range(200))
        disk, stalls, saves, beside = [self._disk(directory, megabytes)], [], [], []
        for number in range(1, self.saves + 1):
            before, start = checkpoints.stall_s, time.perf_counter()
            checkpoints.save(number, state, {"step": number})
            stalls.append(checkpoints.stall_s - before)
            while not checkpoints.path(number).exists():
                beside.append(self._step())
            checkpoints.wait()
            saves.append(megabytes / (time.perf_counter() - start))
            disk.append(self._disk(directory, megabytes))
        start = time.perf_counter()
        assert not damage(checkpoints.path(self.saves))
        verify = megabytes / (time.perf_counter() - start)
        start = time.perf_counter()
        checkpoints.restore(state)
        restore = megabytes / (time.perf_counter() - start)
        checkpoints.close()
        return {
            "state (MB)": megabytes,
            "disk, write + fsync (MB/s)": statistics.median(disk),
            "save, call to commit (MB/s)": statistics.median(saves),
            "save / disk": statistics.median(saves) / statistics.median(disk),
            "stall of the loop, first save (ms)": 1000 * stalls[0],
            "stall of the loop, later saves (ms)": 1000 * statistics.median(stalls[1:] or stalls),
            "stall / time of a synchronous save": statistics.median(stalls[1:] or stalls)
            / (megabytes / statistics.median(saves)),
            "step beside a save / step alone": statistics.median(beside) / alone if beside else 1.0,
            "verify (MB/s)": verify,
            "verify and load (MB/s)": restore,
        }

    def _step(self) -> float:
        """Seconds of one product."""
        start = time.perf_counter()
        torch.mm(a := torch.ones(self.matrix, self.matrix), a)
        return time.perf_counter() - start

    def _disk(self, directory: Path, megabytes: float) -> float:
        """MB/s of plain writes of 4 MB, synced at the end."""
        file, block = directory / "plain", memoryview(os.urandom(1 << 22))
        start = time.perf_counter()
        with open(file, "wb", buffering=0) as stream:
            for _ in range(max(1, round(megabytes * 1e6 / len(block)))):
                stream.write(block)
            os.fsync(stream.fileno())
        took = time.perf_counter() - start
        file.unlink()
        return megabytes / took
