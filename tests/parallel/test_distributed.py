"""Processes find their place from torchrun or srun, and say who is missing."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import distributed, rendezvous
from parallel.distributed import DistributedError, Place, RendezvousError, place
from tests.ranks import RanksError, run_ranks

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*LAUNCHERS, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_alone() -> None:
    assert place() == Place()


def test_torchrun_says_where_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS[:6], ("5", "8", "1", "4", "node7", "1234"), strict=True):
        monkeypatch.setenv(name, value)
    assert place() == Place(5, 8, 1, 4, "node7", 1234, "torchrun")


def test_a_rank_without_a_world_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DistributedError, match="WORLD_SIZE"):
        place()


def test_srun_says_where_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SLURM_STEP_NUM_TASKS": "11",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_STEP_NODELIST": "gpu3,gpu4,gpu5",
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_ID": "2",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(9, 11, 1, 3, "gpu3", 20000 + 17 * 64 + 2, "srun", "step 17.2, start 0", derived=True)


def test_a_batch_script_that_starts_no_step_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert place() == Place()


def test_a_rank_beyond_the_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="rank 2 is not one of 2: ranks go from 0 to 1"):
        place()


def start_twice() -> tuple[float, float]:
    sums = []
    for _ in range(2):
        world = distributed.start()
        assert distributed.start() is world
        value = torch.tensor(float(world.rank + 1))
        dist.all_reduce(value)
        sums.append(value.item())
        distributed.stop()
    return sums[0], sums[1]


def test_a_process_group_can_be_left_and_joined_again() -> None:
    assert run_ranks(2, start_twice) == [(3.0, 3.0)] * 2


def leave_rank_1_behind() -> None:
    if place().rank == 1:
        import time

        time.sleep(60)
    distributed.start(rendezvous_s=1)


def test_a_missing_rank_is_named() -> None:
    with pytest.raises(RanksError, match="rank 1 of 2 did not come within 1 s"):
        run_ranks(2, leave_rank_1_behind)


def fail_on_rank_1() -> None:
    distributed.start()
    if place().rank == 1:
        raise ValueError("a reason")
    dist.barrier()


def test_the_rank_that_fails_is_named_with_its_reason() -> None:
    with pytest.raises(RanksError, match=r"rank 1 of 2 failed: ValueError\('a reason'\)"):
        run_ranks(2, fail_on_rank_1)


def sleep_on_rank_0() -> None:
    import time

    time.sleep(60 * (place().rank == 0))


def test_a_rank_that_hangs_is_killed_and_shows_where_it_stood() -> None:
    with pytest.raises(RanksError, match=r"(?s)rank 0 of 2 failed.*in sleep_on_rank_0"):
        run_ranks(2, sleep_on_rank_0, timeout_s=1)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RendezvousError, match="in use by another program: set MASTER_PORT"):
            distributed.start(rendezvous_s=1)


@pytest.mark.slow
def test_torchrun_starts_a_run() -> None:
    code = "from parallel import distributed as d; print('rank', d.start().rank, 'of', d.start().size); d.stop()"
    root = Path(__file__).parents[2]
    script = f"import sys; sys.path.insert(0, {str(root)!r}); {code}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--no-python", sys.executable, "-c", script]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "rank 0 of 2" in shown
    assert "rank 1 of 2" in shown
    assert "torchrun: 2 processes on 1 machine, cpu, 1 CPU threads each" in shown
