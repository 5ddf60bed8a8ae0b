"""Killed with SIGKILL at any moment and started again, a run ends as if nothing had happened."""

from collections import Counter
from pathlib import Path

import pytest

from tests.train.kills import Campaign, composed, start
from tests.train.test_resume import assert_same_run

SETTINGS = (
    "stage.steps=12",
    "stage.checkpoint_every=2",
    "stage.validate_every=5",
    "stage.validation_batches=1",
    "stage.ema=0.9",
    "model.dropout=0.1",
)
LAYOUTS = {1: (), 2: ("parallel.dp_shard=2", "parallel.zero=2", "parallel.micro_batches=2")}


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> dict[int, tuple[tuple, Path]]:
    """Of each size, the configuration and a run that nobody killed: the same layout has the same bits."""
    runs = {}
    for ranks, layout in LAYOUTS.items():
        run = composed(corpus, *SETTINGS, *layout, ranks=ranks)
        directory = tmp_path_factory.mktemp("undisturbed")
        codes, said = start(run, directory / "run", ranks, None, 0, directory / "tally")
        assert codes == [0] * ranks, said
        runs[ranks] = (run, directory / "run")
    return runs


def killed(undisturbed: dict, ranks: int, directory: Path, times: int, seed: int) -> Counter[str]:
    run, expected = undisturbed[ranks]
    campaign = Campaign(run, ranks, directory, expected, assert_same_run)
    campaign.kill(times, seed)
    return campaign.struck


@pytest.mark.parametrize(("ranks", "times"), [(1, 21), (2, 4)])
def test_25_kills_leave_no_trace(tmp_path, undisturbed, ranks, times):
    struck = killed(undisturbed, ranks, tmp_path, times, seed=ranks)
    print(f"{sum(struck.values())} kills of {ranks} ranks: {dict(struck.most_common())}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(20))
def test_1000_kills_leave_no_trace(tmp_path, undisturbed, seed):
    """Of every four campaigns of 50 kills, one is of two ranks."""
    ranks = 2 if seed % 4 == 3 else 1
    struck = killed(undisturbed, ranks, tmp_path, 50, seed=100 + seed)
    print(f"{sum(struck.values())} kills of {ranks} ranks: {dict(struck.most_common())}")
