"""One command, three ways: alone, under torchrun and under srun, with no flag to say which."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import Cluster
from tests.train.runs import SETTINGS
from tests.train.test_resume import losses

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TRAIN = ["-m", "train", *SETTINGS, "stage.steps=4", "preflight=quick"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SHARED = ("parallel.dp_shard=2", "parallel.zero=2")


def environment(**variables: str) -> dict[str, str]:
    """Without what another launcher may have set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_STEP", "SLURM_PROC"))}
    return clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def together(*commands: list[str], **variables: str) -> tuple[list[int], list[str]]:
    """Exit codes and output of commands that run at the same time."""
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**variables), cwd=ROOT
        )
        for command in commands
    ]
    shown = [process.communicate(timeout=280)[0] for process in running]
    return [process.returncode for process in running], shown


def machines(*settings: list[str]) -> list[list[str]]:
    """torchrun on as many machines as there are lists, all of them this one, with one process each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    options = [f"--nnodes={len(settings)}", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={where}"]
    options += ["--rdzv-id=test", "--local-addr=127.0.0.1"]
    return [[*TORCHRUN, *options, *TRAIN, *own] for own in settings]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    codes, shown = together([sys.executable, *TRAIN, f"data.path={corpus}", f"run_dir={run_dir}"])
    assert codes == [0], shown[0][-4000:]
    assert "alone: 1 process, cpu" in shown[0]
    return run_dir


def assert_same_losses(run_dir: Path, other: Path) -> None:
    assert len(losses(run_dir)) == 4
    assert dict(losses(run_dir)) == pytest.approx(dict(losses(other)), abs=5e-6)


def test_two_torchruns_make_one_run_with_the_losses_of_one_process(corpus, tmp_path, alone):
    settings = [f"data.path={corpus}", f"run_dir={tmp_path}/run", *SHARED]
    codes, shown = together(*machines(settings, settings))
    assert codes == [0, 0], shown
    assert any("torchrun: 2 processes on 1 machine, cpu, 1 CPU threads each" in text for text in shown)
    assert any("(torchrun's agent), gloo over lo" in text for text in shown)
    assert_same_losses(tmp_path / "run", alone)


def test_a_machine_with_another_configuration_is_named_before_anything_is_written(corpus, tmp_path):
    settings = [f"data.path={corpus}", f"run_dir={tmp_path}/run", *SHARED]
    codes, shown = together(*machines(settings, [*settings, "optim.lr=0.5"]))
    assert 0 not in codes
    assert "the ranks of this run were not started alike" in "".join(shown)
    assert "optim.lr: " in "".join(shown) and "0.5 on rank" in "".join(shown)
    assert not (tmp_path / "run").exists()


def srun(*command: str) -> list[str]:
    return ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--kill-on-bad-exit=1", *command]


@pytest.mark.slurm
def test_srun_makes_one_run_of_two_nodes_with_the_losses_of_one_process(slurm: Cluster, corpus, tmp_path, alone):
    slurm.clear()
    settings = [f"data.path={corpus}", f"run_dir={tmp_path}/run", "parallel.dp_shard=4", "parallel.zero=3"]
    codes, shown = together(srun(sys.executable, *TRAIN, *settings))
    assert codes == [0], shown[0][-4000:]
    assert "srun: 4 processes on 2 machines, cpu" in shown[0] and "(of the job's number), gloo over lo" in shown[0]
    assert_same_losses(tmp_path / "run", alone)


@pytest.mark.slurm
def test_a_node_with_another_configuration_is_named(slurm: Cluster, corpus, tmp_path):
    slurm.clear()
    words = [sys.executable, *TRAIN, f"data.path={corpus}", f"run_dir={tmp_path}/run", "parallel.dp_shard=4"]
    codes, shown = together(srun("bash", "-c", f"exec {' '.join(words)} seed=$SLURM_NODEID"))
    assert codes != [0]
    assert "seed: 0 on rank 0-1, 1 on rank 2-3" in shown[0]


@pytest.mark.slurm
def test_a_burn_in_has_a_line_for_each_node(slurm: Cluster, corpus, tmp_path):
    slurm.clear()
    small = ["preflight.compute_s=0.2", "preflight.links_mb=1", "preflight.disk_mb=1", "preflight.disk_mb_s=0"]
    settings = [f"data.path={corpus}", f"run_dir={tmp_path}/run", "parallel.dp_shard=2", "parallel.tp=2"]
    command = [sys.executable, "-m", "train", "stage=preflight", *small, "preflight.share=0.001", *settings]
    codes, shown = together(srun(*command))
    assert codes == [0], shown[0][-4000:]
    lines = [line.split()[:2] for line in shown[0].splitlines()]
    assert ["n1", "0-1"] in lines and ["n2", "2-3"] in lines
    assert json.loads((tmp_path / "run" / "preflight.json").read_text())["machines"] == 2
