"""A slow rank is named with its host, wherever it loses its time; ranks that are alike, or wait, are not."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.loader import Loader
from parallel.engines.native import NativeEngine
from parallel.launch import place
from tests.ranks import run_ranks
from tests.train.test_retries import train
from train.stragglers import Slow, slow

SETTINGS = ("stage.steps=9", "stage.checkpoint_every=0", "parallel.dp_shard=2", "parallel.zero=2")
SETTINGS += ("failures.straggler=2", "failures.straggler_every=2")


def test_the_median_of_the_looks_and_of_the_peers_counts():
    once = [[1.0, 1.0, 1.0, 1.0], [1.0, 9.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    assert slow(once, 1, 1.5) == []
    assert slow([[1.0, 1.1, 2.0, 0.9]] * 3, 1, 1.5) == [Slow(2, 2.0, 2.0)]
    assert slow([[1.0, 4.0]] * 3, 1, 1.5) == [Slow(1, 4.0, 4.0)]


def test_stages_of_a_pipeline_may_differ():
    assert slow([[1.0, 1.0, 3.0, 3.0]] * 3, 2, 1.5) == []
    assert slow([[1.0, 1.0, 3.0, 6.0]] * 3, 2, 1.5) == [Slow(3, 6.0, 2.0)]
    assert slow([[1.0, 5.0]] * 3, 2, 1.5) == [], "nobody to compare with"


def slowed(cls: type, name: str) -> None:
    """On rank 1."""
    original = getattr(cls, name)

    def slowly(self: Any, *arguments: Any) -> Any:
        time.sleep(0.6 * (place().rank == 1))
        return original(self, *arguments)

    setattr(cls, name, slowly)


def in_the_step() -> None:
    slowed(NativeEngine, "train_step")


def in_the_data() -> None:
    slowed(Loader, "batch")


@pytest.mark.slow
@pytest.mark.parametrize("where", [in_the_step, in_the_data])
def test_a_rank_that_loses_time_is_named_once_with_its_host(corpus, tmp_path, where):
    assert run_ranks(2, train, corpus, tmp_path / "run", SETTINGS, where) == [0, 0]
    alerts = alerted(tmp_path / "run")
    assert alerts.count("straggler") == 1
    assert f"rank 1 of 2 (on {socket.gethostname()}) is slow" in alerts


def alerted(run_dir: Path) -> str:
    file = run_dir / "alerts.jsonl"
    return file.read_text() if file.exists() else ""
