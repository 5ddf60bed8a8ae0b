"""What is tried again without leaving the process: a save, a read, a step after the network broke."""

import errno
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf import entry
from data_pipeline import loader
from data_pipeline.loader import Loader
from parallel.launch import place
from tests.ranks import run_ranks
from tests.train.runs import SETTINGS, complete
from tests.train.test_resume import assert_same_run
from train.__main__ import main
from train.checkpoint.committed import steps
from train.checkpoint.storage import Writer
from train.config import RunConfig
from train.monitor import Monitor

TWO = ("stage.steps=12", "stage.checkpoint_every=3", "parallel.dp_shard=2", "parallel.zero=2")


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    complete(corpus, run_dir, *TWO, ranks=2)
    return run_dir


def train(corpus: Path, run_dir: Path, settings: tuple[str, ...], disturb: Any) -> Any:
    """`python -m train` on this rank, disturbed; answers with the exit code."""
    disturb()
    sys.argv = ["train", "stage=pretrain", f"data.path={corpus}", f"run_dir={run_dir}", *SETTINGS, *settings]
    try:
        entry.run("train", RunConfig, main)
    except SystemExit as end:
        return end.code
    return 0


def break_the_network() -> None:
    """At step 8, rank 1 loses every connection but that to the store."""
    record = Monitor.record
    broken = []

    def disturbed(self: Monitor, step: int, *others: Any) -> None:
        record(self, step, *others)
        if step == 8 and place().rank == 1 and not broken:
            broken.append(step)
            for number in os.listdir("/proc/self/fd"):
                with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as found:
                    if found.getpeername()[1] != int(os.environ["MASTER_PORT"]):
                        found.shutdown(socket.SHUT_RDWR)

    Monitor.record = disturbed  # type: ignore[method-assign, assignment]


@pytest.mark.slow
def test_ranks_that_all_live_go_back_to_the_checkpoint_without_leaving_their_processes(corpus, tmp_path, undisturbed):
    assert run_ranks(2, train, corpus, tmp_path / "run", TWO, break_the_network) == [0, 0]
    assert_same_run(tmp_path / "run", undisturbed)


def fail_two_saves() -> None:
    """The second and third one, on rank 1."""
    write, calls = Writer.write_data, []

    def disturbed(self: Writer, *others: Any) -> Any:
        calls.append(self)
        if place().rank == 1 and len(calls) in (2, 3):
            raise OSError(errno.EIO, "the disk is away")
        return write(self, *others)

    Writer.write_data = disturbed  # type: ignore[method-assign, assignment]


def test_a_save_that_fails_is_tried_again_at_the_next_due_step(corpus, tmp_path, undisturbed):
    assert run_ranks(2, train, corpus, tmp_path / "run", (*TWO, "stage.keep=9"), fail_two_saves) == [0, 0]
    assert steps(tmp_path / "run" / "checkpoints") == [3, 12]
    alerts = (tmp_path / "run" / "alerts.jsonl").read_text()
    assert "the disk is away" in alerts and alerts.count("Training goes on") == 2
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_save_that_fails_too_often_ends_the_run(corpus, tmp_path):
    settings = (*TWO, "failures.save_retries=1")
    assert run_ranks(2, train, corpus, tmp_path / "run", settings, fail_two_saves) == [1, 1]


class Unsteady:
    """Samples on a file server that is away for some reads."""

    order = None

    def __init__(self, failures: int):
        self.failures = failures

    def __len__(self) -> int:
        return 8

    def micro_batch(self, indices: list[int]) -> Any:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ESTALE, "the server is away")
        raise LookupError("read")


@pytest.mark.parametrize(("failures", "expected"), [(2, LookupError), (3, OSError)])
def test_samples_are_read_again_after_an_error_of_the_file_system(monkeypatch, failures, expected):
    paused: list[float] = []
    monkeypatch.setattr(loader.time, "sleep", paused.append)
    monkeypatch.setattr(loader, "order_of", lambda samples, seed: np.arange(8))
    shape = {"global_batch": 8, "micro_batches": 1, "dp_rank": 0, "dp_size": 1, "seed": 0}
    unsteady = Loader(Unsteady(failures), **shape, retries=2)  # type: ignore[arg-type]
    with unsteady, pytest.warns(UserWarning, match="the server is away"), pytest.raises(expected):
        unsteady._make(0)
    assert paused == [1, 2]
