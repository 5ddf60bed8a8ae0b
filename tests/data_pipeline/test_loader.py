"""The loader is a function of the step, whatever the number of ranks, and hides no error."""

import threading

import pytest
import torch

from conf.errors import ConfigError
from data_pipeline.batch import MicroBatch
from data_pipeline.loader import Loader


class Numbers:
    """Sample i holds the token i."""

    fingerprint = "numbers"

    def __init__(self, length: int = 100, broken: int | None = None):
        self.length = length
        self.broken = broken

    def __len__(self) -> int:
        return self.length

    def micro_batch(self, indices):
        if self.broken in indices:
            raise OSError(f"sample {self.broken} cannot be read")
        tokens_BL = torch.tensor(indices)[:, None]
        return MicroBatch(tokens_BL, tokens_BL, tokens_BL, tokens_BL, torch.tensor(indices))


def visited(steps, *, dp_size, micro_batches, seed=5, length=100):
    """(sample, position in the run) of each step in global order: micro-batch, rank, row."""
    loaders = [
        Loader(Numbers(length), global_batch=12, micro_batches=micro_batches, dp_rank=rank, dp_size=dp_size, seed=seed)
        for rank in range(dp_size)
    ]
    result = []
    for step in steps:
        ranks = [loader.batch(step) for loader in loaders]
        parts = [ranks[rank][m] for m in range(micro_batches) for rank in range(dp_size)]
        result.append(
            [
                (t, k)
                for part in parts
                for t, k in zip(part.tokens_BL[:, 0].tolist(), part.samples_B.tolist(), strict=True)
            ]
        )
    for loader in loaders:
        loader.close()
    return result


@pytest.mark.parametrize(("dp_size", "micro_batches"), [(1, 3), (2, 1), (2, 3), (3, 2), (4, 1), (6, 2)])
def test_steps_hold_the_same_samples_in_the_same_order_at_any_size(dp_size, micro_batches):
    assert visited(range(20), dp_size=dp_size, micro_batches=micro_batches) == visited(
        range(20), dp_size=1, micro_batches=1
    )


def test_samples_carry_their_position_in_the_run():
    assert [k for step in visited(range(3), dp_size=2, micro_batches=2) for _, k in step] == list(range(36))


def test_a_loader_that_starts_later_goes_on_where_another_stopped():
    assert visited(range(7, 12), dp_size=2, micro_batches=1) == visited(range(12), dp_size=1, micro_batches=1)[7:]


def test_an_epoch_sees_every_sample_once():
    seen = [t for step in visited(range(9), dp_size=1, micro_batches=1, length=108) for t, _ in step]
    assert sorted(seen) == list(range(108))


def test_steps_may_be_asked_for_in_any_order():
    forward = visited(range(6), dp_size=1, micro_batches=2)
    assert visited([5, 0, 3, 3, 1], dp_size=1, micro_batches=2) == [forward[s] for s in (5, 0, 3, 3, 1)]


def test_an_error_in_the_thread_is_raised_by_the_step_that_needed_the_sample():
    healthy = visited(range(9), dp_size=1, micro_batches=1)
    step = next(s for s, samples in enumerate(healthy) if 42 in [t for t, _ in samples])
    with Loader(Numbers(broken=42), global_batch=12, micro_batches=1, dp_rank=0, dp_size=1, seed=5) as loader:
        for earlier in range(step):
            loader.batch(earlier)
        with pytest.raises(OSError, match="sample 42"):
            loader.batch(step)


def test_what_the_objective_prepares_is_prepared_in_the_thread():
    names = []

    def prepare(micro_batch):
        names.append(threading.current_thread().name)
        return micro_batch

    with Loader(Numbers(), global_batch=4, micro_batches=2, dp_rank=0, dp_size=1, seed=0, prepare=prepare) as loader:
        loader.batch(0)
    assert names
    assert all(name.startswith("loader") for name in names)
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused():
    with pytest.raises(ConfigError, match=r"stage\.global_batch=10: a multiple of 2 micro-batches x 3"):
        Loader(Numbers(), global_batch=10, micro_batches=2, dp_rank=0, dp_size=3, seed=0)
