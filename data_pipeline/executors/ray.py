"""Pieces as tasks of a Ray cluster. Its nodes must see run_dir and the code under the same paths."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.executors.base import GO_ON, Executor, Job, PieceError, attempt

ROOT = Path(__file__).parents[2]
"""Where the code is."""


@register("executor", "ray")
@dataclass(frozen=True)
class Ray(Executor):
    """Tasks of Ray, which `pip install ray` brings.

    datatrove's own executor forks inside an actor and waits for ever for a fork that was killed; and it ends well when
    pieces have failed.

    Args:
        address: of the cluster, "auto" for the one that this machine belongs to; empty starts one on this machine.
        cpus: cores reserved for a piece.
        memory_gb: memory reserved for a piece, in GB of 10^9 bytes; 0 reserves none.
    """

    address: str = ""
    cpus: float = 1.0
    memory_gb: float = 0.0

    def problems(self) -> list[Problem]:
        found = [] if self.cpus > 0 else [Problem("executor.cpus", self.cpus, "more than 0")]
        return found + ([] if self.memory_gb >= 0 else [Problem("executor.memory_gb", self.memory_gb, "0 or more")])

    def at_once(self, workers: int) -> int:
        return workers or 2**31

    def run(self, job: Job, pieces: Sequence[int], workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise PieceError("executor=ray needs Ray; `pip install ray`, or take executor=local.") from error
        import dill
        from ray.exceptions import RayError

        if not ray.is_initialized():
            cores = None if self.address else min(workers, len(os.sched_getaffinity(0)))
            ray.init(
                address=self.address or None,
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}},
            )
        memory = int(self.memory_gb * 1e9)
        # A task that died is not tried again behind our back: its piece would be worked on twice.
        remote = ray.remote(num_cpus=self.cpus, memory=memory, max_retries=0)(_attempt)
        packed = ray.put(dill.dumps((job, str(Path.cwd()))))
        left, busy = list(pieces)[::-1], dict[Any, int]()
        failed: Exception | None = None
        while left or busy:
            while left and failed is None and len(busy) < workers:
                piece = left.pop()
                busy[remote.remote(packed, piece)] = piece
            if not busy:
                break
            (done, *_), _ = ray.wait(list(busy))
            piece = busy.pop(done)
            try:
                failed = failed or dill.loads(ray.get(done))  # noqa: S301  Ray itself hands objects on so
            except RayError as lost:
                cause = str(lost).strip().split("\n")[0]
                failed = failed or PieceError(
                    f"{job.directory}: Ray lost the process that worked on piece {piece}: {cause} {GO_ON}"
                )
        if failed is not None:
            raise failed


def _attempt(packed: bytes, piece: int) -> Any:
    """In a task."""
    import dill

    job, directory = dill.loads(packed)  # noqa: S301  who may submit to a Ray cluster runs code on it anyhow
    os.chdir(directory)  # paths of the configuration are relative to where it was started
    return dill.dumps(attempt(job, piece))
