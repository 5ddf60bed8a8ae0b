"""Killed with SIGKILL at any moment and started again, a run ends as if nothing had happened."""

import random
import time
from pathlib import Path

import pytest

from tests.train.runs import begin, complete, until
from tests.train.test_resume import assert_same_run, losses
from train.checkpoint.committed import damage
from train.checkpoint.committed import steps as committed

SETTINGS = (
    "stage.steps=16",
    "stage.checkpoint_every=2",
    "stage.validate_every=6",
    "stage.ema=0.9",
    "model.dropout=0.1",
    "model.hidden=128",
)
LAYOUTS = {
    1: (),
    2: ("parallel.dp_shard=2", "parallel.zero=2", "parallel.micro_batches=2"),
}


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> dict[int, Path]:
    """Of each size: the same layout has the same bits."""
    runs: dict[int, Path] = {}
    for ranks, layout in LAYOUTS.items():
        runs[ranks] = tmp_path_factory.mktemp("uninterrupted") / "run"
        complete(corpus, runs[ranks], *SETTINGS, *layout, ranks=ranks)
    return runs


def killed_until_done(corpus: Path, run_dir: Path, ranks: int, kills: int, seed: int) -> int:
    """Kill all ranks so many times, every other time inside a save, then let the run end.

    Returns:
        How many kills left a torn save behind.
    """
    dice = random.Random(seed)
    checkpoints = run_dir / "checkpoints"
    torn = 0
    for kill in range(kills):
        running = begin(corpus, run_dir, *SETTINGS, *LAYOUTS[ranks], ranks=ranks)
        target = len(losses(run_dir)) + dice.randrange(1, 5)
        until(lambda target=target: len(losses(run_dir)) >= min(target, 15), running)
        if kill % 2 == 0:
            deadline = time.monotonic() + 0.5
            while not list(checkpoints.glob(".step-*.tmp/*")) and time.monotonic() < deadline:
                pass
            time.sleep(dice.choice([0, 0, 0.0005, 0.001, 0.003]))
        else:
            time.sleep(dice.random() * 0.05)
        running.kill()
        torn += bool(list(checkpoints.glob(".step-*.tmp")))
        assert all(not damage(checkpoints / f"step-{step:08d}") for step in committed(checkpoints))
    complete(corpus, run_dir, *SETTINGS, *LAYOUTS[ranks], ranks=ranks)
    return torn


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_few_kills_leave_no_trace(corpus, tmp_path, uninterrupted, ranks):
    killed_until_done(corpus, tmp_path / "run", ranks, kills=2, seed=ranks)
    assert_same_run(tmp_path / "run", uninterrupted[ranks])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(9))
def test_many_kills_leave_no_trace(corpus, tmp_path, uninterrupted, seed):
    ranks = 1 + seed % 2
    torn = killed_until_done(corpus, tmp_path / "run", ranks, kills=5, seed=100 + seed)
    assert_same_run(tmp_path / "run", uninterrupted[ranks])
    print(f"{torn} of 5 kills came inside a save")
