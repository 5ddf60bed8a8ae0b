"""From samples to micro-batches: a pure function of the step, computed ahead in a thread.

Step s takes the samples k = s*G ... (s + 1)*G - 1 of the run, G being the global batch; micro-batch m is the m-th part
of these, and each data-parallel rank has its contiguous share of every micro-batch. So the samples of a step, and
their order over (micro-batch, rank, row), are the same for every number of ranks: a run resumes at any size.
"""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Self, TypeVar

import numpy as np
import torch

from conf.errors import ConfigError, Problem
from data_pipeline.batch import MicroBatch, Samples
from data_pipeline.order import order_of

AHEAD = 2
"""Steps prepared beyond the one that was asked for."""

Batch = TypeVar("Batch", bound=MicroBatch)


class Loader:
    """Hands out the micro-batches of one data-parallel rank.

    Args:
        samples: what is visited.
        global_batch: samples per step, over all ranks and micro-batches.
        micro_batches: parts that a rank takes one after the other.
        dp_rank: this rank among the data-parallel ones.
        dp_size: number of data-parallel ranks.
        seed: of the order, where the samples have none of their own.
        prepare: the objective's last touch on a micro-batch; runs in the thread.
        retries: times that reading a step's samples is tried again after an I/O error, after 1 s, 2 s, 4 s, ...

    Raises:
        ConfigError: the global batch cannot be divided evenly.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        global_batch: int,
        micro_batches: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        prepare: Callable[[MicroBatch], MicroBatch] | None = None,
        retries: int = 0,
    ):
        if global_batch < 1 or global_batch % (micro_batches * dp_size):
            raise ConfigError(
                [
                    Problem(
                        "stage.global_batch",
                        global_batch,
                        f"a multiple of {micro_batches} micro-batches x {dp_size} data-parallel ranks = "
                        f"{micro_batches * dp_size}, so that every rank has as many samples",
                    )
                ]
            )
        self.samples = samples
        self.global_batch = global_batch
        self.micro_batches = micro_batches
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.order = order_of(samples, seed)
        self.prepare = prepare
        self.retries = retries
        self._pin = torch.cuda.is_available()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step (from 0), prepared ahead if the steps come in sequence.

        Whatever went wrong in the thread is raised here.
        """
        wanted = range(step, step + AHEAD + 1)
        for other in [s for s in self._ahead if s not in wanted]:
            self._ahead.pop(other).cancel()
        for s in wanted:
            if s not in self._ahead:
                self._ahead[s] = self._thread.submit(self._make, s)
        return self._ahead.pop(step).result()

    def _make(self, step: int) -> list[MicroBatch]:
        for tried in range(self.retries):
            try:
                return self._read(step)
            except OSError as error:  # a file server that is away for a moment
                pause_s = 2**tried
                warnings.warn(
                    f"the samples of step {step} cannot be read ({error}): again in {pause_s} s", stacklevel=2
                )
                time.sleep(pause_s)
        return self._read(step)

    def _read(self, step: int) -> list[MicroBatch]:
        ks = step * self.global_batch + np.arange(self.global_batch)
        shares = ks.reshape(self.micro_batches, self.dp_size, -1)[:, self.dp_rank]
        return [self._micro_batch(share) for share in shares]

    def _micro_batch(self, ks: np.ndarray) -> MicroBatch:
        micro_batch = self.samples.micro_batch(self.order[ks].tolist())
        repeats = len(micro_batch.samples_B) // len(ks)  # a preference pair is two sequences
        micro_batch = replace(micro_batch, samples_B=torch.from_numpy(np.tile(ks, repeats)))
        if self.prepare is not None:
            micro_batch = self.prepare(micro_batch)
        return _pinned(micro_batch) if self._pin else micro_batch

    def close(self) -> None:
        """Stop the thread; what it was preparing is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _pinned(micro_batch: Batch) -> Batch:
    """In page-locked memory, from which a copy to the GPU runs beside the computation."""
    return replace(micro_batch, **{f.name: getattr(micro_batch, f.name).pin_memory() for f in fields(micro_batch)})
