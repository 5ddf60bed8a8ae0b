"""Runs on a real Slurm that takes their nodes, their time and their turn away: each ends as if nothing had happened.

A run of the same layout that nobody disturbed is the measure: the same loss at every step, each step once, the same
bits in the model.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from launchers import preflight
from launchers.slurm import jobs
from launchers.slurm.resources import SlurmConfig
from tests.data import tiny_corpus
from tests.slurm import Cluster, until
from tests.train.runs import SETTINGS, begin
from tests.train.test_resume import assert_same_run, losses
from train import goodput

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
LAYOUT = ("parallel.dp_shard=2", "parallel.zero=2")
TRAINING = (*SETTINGS, "data.sequence_length=64", "model.hidden=128", "model.dropout=0.1", *LAYOUT)
QUICK = (*TRAINING, "stage.steps=120", "stage.checkpoint_every=10")
LONG = (*TRAINING, "stage.steps=6000", "stage.checkpoint_every=100", "model.hidden=32")
"""Minutes: longer than the shortest time limit."""


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture
def cluster(slurm: Cluster, patch) -> Cluster:
    slurm.clear()
    return slurm


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), documents=60)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    return alone(corpus, tmp_path_factory.mktemp("undisturbed") / "run", *QUICK)


def alone(corpus: Path, run_dir: Path, *settings: str) -> Path:
    """The same run as two processes of this machine."""
    running = begin(corpus, run_dir, *settings, ranks=2)
    assert running.wait(600) == [0, 0], running.output()
    return run_dir


def submitted(run_dir: Path, corpus: Path, *settings: str, **resources) -> str:
    """Submit a training run; returns the job's number. Its configuration is not checked: that takes the import of
    torch, and tests/launchers/test_slurm.py does it."""
    config = SlurmConfig(**resources)
    command = ["train", "stage=pretrain", f"data.path={corpus}", f"run_dir={run_dir}", *settings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "answers", lambda calls: {"run": preflight.Answer(run_dir=str(run_dir))})
        said = jobs.submit(config, asdict(config), command)
    return re.search(r"job (\d+) for", said)[1]


def reached(run_dir: Path, step: int, timeout_s: float = 120) -> None:
    """Wait until a run has trained so many steps."""
    until(lambda: len(losses(run_dir)) >= step, f"{run_dir} did not come to step {step}", timeout_s)


def assert_nothing_happened(run_dir: Path, undisturbed: Path, attempts: int) -> None:
    """The run is the undisturbed one, and accounts for so many starts."""
    assert_same_run(run_dir, undisturbed)
    account = goodput.account(goodput.read(run_dir))
    assert len(account.shares) == attempts
    print(f"\n{account.headline()}")


def test_a_job_of_higher_priority_takes_the_nodes_and_gives_them_back(cluster, corpus, tmp_path, undisturbed):
    job = submitted(tmp_path / "run", corpus, *QUICK, tasks_per_node=2)
    reached(tmp_path / "run", 30)
    urgent = cluster.submit("sleep 2", "--partition=high", "--nodes=3", "--exclusive")
    cluster.wait(urgent, "COMPLETED", timeout_s=120)
    cluster.wait(job, "COMPLETED", timeout_s=240, restarts=1)
    assert_nothing_happened(tmp_path / "run", undisturbed, attempts=2)
    assert "with a checkpoint" in (tmp_path / "run/logs/rank-0.log").read_text()  # it was warned, and lost no step
    assert goodput.account(goodput.read(tmp_path / "run")).lost_steps == 0


def test_a_time_limit_is_met_with_a_checkpoint_and_a_new_start(cluster, corpus, tmp_path):
    alone(corpus, tmp_path / "undisturbed", *LONG)
    job = submitted(tmp_path / "run", corpus, *LONG, tasks_per_node=2, time="2", warning_s=55)
    cluster.wait(job, "COMPLETED", timeout_s=600, restarts=1)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    account = goodput.account(goodput.read(tmp_path / "run"))
    assert len(account.shares) > 1 and account.lost_steps == 0
    print(f"\n{account.headline()}")


def test_a_node_lost_between_two_steps_costs_a_restart_on_those_that_are_left(cluster, corpus, tmp_path, undisturbed):
    job = submitted(tmp_path / "run", corpus, *QUICK, nodes=2)
    lost: list[str] = []
    for start in range(2):  # the second node first, then the one of the batch script and rank 0
        reached(tmp_path / "run", 25 + 35 * start)
        fields = cluster.job(job)
        nodes = expanded(fields["NodeList"])
        lost.append(nodes[-1] if start == 0 else fields["BatchHost"])
        cluster.kill(lost[-1])
        cluster.wait(job, "RUNNING", timeout_s=120, restarts=start + 1)
        assert lost[-1] not in expanded(cluster.job(job)["NodeList"])
        cluster.up(lost[-1])
    cluster.wait(job, "COMPLETED", timeout_s=240)
    assert_nothing_happened(tmp_path / "run", undisturbed, attempts=3)


def test_a_node_lost_inside_a_save_leaves_the_checkpoint_before(cluster, corpus, tmp_path, undisturbed):
    job = submitted(tmp_path / "run", corpus, *QUICK, nodes=2)
    reached(tmp_path / "run", 25)
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob(".step-*.tmp/*")):
        assert time.monotonic() < deadline, "no save was seen"
    cluster.kill(cluster.job(job)["BatchHost"])
    torn = list(checkpoints.glob(".step-*.tmp"))
    cluster.wait(job, "COMPLETED", timeout_s=300, restarts=1)
    assert_nothing_happened(tmp_path / "run", undisturbed, attempts=2)
    print(f"{len(torn)} save was under way when the node went")


def expanded(nodes: str) -> list[str]:
    """n[1-2,5] as a list."""
    prefix, _, inside = nodes.partition("[")
    if not inside:
        return nodes.split(",")
    found = []
    for part in inside.rstrip("]").split(","):
        first, _, last = part.partition("-")
        found += [f"{prefix}{number}" for number in range(int(first), int(last or first) + 1)]
    return found
