"""torchrun's agent ends as its ranks did; a run shrinks and grows under it, and trains the same."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.torchrun import code_of
from tests.data import tiny_corpus
from tests.train.runs import SETTINGS, begin
from tests.train.test_resume import losses

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((76, -9), 76), ((-9, 75), 76), ((76, 3), 3), ((0, 75), 75), ((-15,), 76)],
)
def test_the_code_is_that_of_a_rank_that_failed_else_of_one_that_was_lost_else_75(codes, expected):
    assert code_of(codes) == expected


class Agents:
    """torchrun's agents of a run on this machine, as if each were a node of its own."""

    def __init__(self, directory: Path, port: int, arguments: list[str]):
        self.directory, self.port, self.arguments = directory, port, arguments
        self.all: list[subprocess.Popen] = []

    def add(self) -> subprocess.Popen:
        options = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5", "--rdzv-backend=c10d", "--rdzv-id=run"]
        options += [f"--rdzv-endpoint=127.0.0.1:{self.port}", "--local-addr=127.0.0.1"]
        options += ["--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"]
        log = open(self.directory / f"agent.{len(self.all)}.log", "w")  # noqa: SIM115
        command = [sys.executable, "-m", "launchers.torchrun", *options, "-m", "train", *self.arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.all.append(agent)
        return agent

    def serves(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def output(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.directory.glob("agent.*.log")))

    def until(self, condition) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert any(agent.poll() is None for agent in self.all), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def agents(tmp_path):
    made: list[Agents] = []

    def make(arguments: list[str]) -> Agents:
        made.append(Agents(tmp_path, free_port(), arguments))
        return made[-1]

    yield make
    for agent in [agent for one in made for agent in one.all]:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_shrinks_and_grows_under_torchrun_with_the_batch_kept(agents, tmp_path):
    """Two nodes; one is asked to leave, and comes back."""
    corpus = tiny_corpus(tmp_path / "corpus", documents=60)
    settings = ("parallel=elastic", "parallel.micro_batches=${micro_batches_of:2}", "stage.steps=200")
    settings += ("stage.checkpoint_every=20",)
    whole = begin(corpus, tmp_path / "whole", *settings)
    assert whole.wait(timeout_s=400) == [0]
    run_dir = tmp_path / "run"
    run = agents(["stage=pretrain", f"data.path={corpus}", f"run_dir={run_dir}", *SETTINGS, *settings])
    run.add()
    run.until(run.serves)  # where the agents meet is where one stays
    leaves = run.add()
    run.until(lambda: "2 processes on 1 machine" in run.output() and len(losses(run_dir)) >= 20)
    leaves.send_signal(signal.SIGUSR2)
    assert leaves.wait(timeout=120) == 75, run.output()
    stopped = len(losses(run_dir))
    run.until(lambda: "1 process" in run.output() and len(losses(run_dir)) >= stopped + 20)
    run.add()
    run.until(lambda: run.output().count("2 processes on 1 machine") == 2)
    run.until(lambda: run.all[0].poll() is not None)
    assert run.all[0].returncode == 0, run.output()
    found, expected = losses(run_dir), losses(tmp_path / "whole")
    assert [step for step, _ in found] == [step for step, _ in expected]
    differences = [abs(one - other) for (_, one), (_, other) in zip(found, expected, strict=True)]
    assert max(differences[:20]) <= 5e-6 and max(differences) <= 5e-4  # rounding grows over ten times as many steps
