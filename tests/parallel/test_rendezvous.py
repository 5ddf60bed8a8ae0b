"""Every rank comes once, of the same run, and those who wait say for whom."""

import contextlib
import io
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import distributed, rendezvous
from parallel.launch import DistributedError, Place, RendezvousError, interface_of, place, route_to
from parallel.rendezvous import Seat, Word, judge
from tests.ranks import run_ranks

OWN = {"TORCHELASTIC_USE_AGENT_STORE": "False"}
"""Rank 0 serves the store."""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def joined(**limits: float) -> tuple[str, float]:
    """What is printed, or the error; and the sum of all ranks' numbers."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            distributed.start(**limits)
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        dist.barrier()
    except (DistributedError, RendezvousError) as error:
        return str(error), 0.0
    return printed.getvalue(), total.item()


def as_rank(refused: Path, *ranks: int) -> tuple[int, str, float]:
    """Of two; with the number of the process. Those who have joined stay until all others are refused."""
    os.environ |= {"RANK": str(ranks[int(os.environ["RANK"])]), "WORLD_SIZE": "2"}
    said, total = joined(rendezvous_s=20)
    if not total:
        (refused / str(os.getpid())).touch()
    deadline = time.monotonic() + 20
    while len(list(refused.iterdir())) < len(ranks) - 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getpid(), said, total


def test_of_two_processes_of_one_rank_one_joins_and_the_other_names_both(tmp_path):
    found = run_ranks(4, as_rank, tmp_path, 0, 1, 1, 0, env=OWN | {"MASTER_PORT": free_port()})
    assert sorted(total for _, _, total in found) == [0, 0, 3, 3]
    host = socket.gethostname()
    for rank, (one, other) in {1: (found[1], found[2]), 0: (found[0], found[3])}.items():
        (owner, _, _), (refused, said, _) = (one, other) if one[2] else (other, one)
        assert f"process {owner} on {host}" in said and f"process {refused} on {host}" in said and "second time" in said
        assert (f"rank {rank} was started twice" if rank else "which is rank 0 of 2 already") in said


def late(rank: int) -> tuple[str, float]:
    rendezvous.REMIND_S, rendezvous.LOOK_S = 0.3, 0.1
    os.environ["LOCAL_RANK"] = "0"  # of each machine one process says what it waits for
    if place().rank == rank:
        time.sleep(1.5)
    return joined()


@pytest.mark.parametrize(("rank", "who", "said"), [(2, 0, "waiting for rank 2 of 3"), (0, 1, "rank 1 of 3 waits for")])
def test_who_waits_for_a_late_rank_says_so_and_goes_on_once_it_comes(rank, who, said):
    found = run_ranks(3, late, rank, env=OWN | {"MASTER_PORT": free_port()})
    assert said in found[who][0] and "of at most 300 s" in found[who][0]
    assert [total for _, total in found] == [6, 6, 6]


def of_another_size() -> tuple[str, float]:
    if place().rank == 1:
        os.environ["WORLD_SIZE"] = "3"
    return joined(rendezvous_s=3)


def test_ranks_that_count_other_numbers_of_processes_are_told():
    first, second = run_ranks(2, of_another_size, env=OWN | {"MASTER_PORT": free_port()})
    assert "was started as one of 3 processes, rank 0 (process" in second[0]
    assert "rank 1 of 2 did not come within 3 s" in first[0]


def by_srun(*jobs: int) -> tuple[str, float]:
    """Two tasks for each job."""
    number = int(os.environ.pop("RANK"))
    os.environ.pop("MASTER_PORT")
    os.environ |= {"SLURM_JOB_ID": str(jobs[number // 2]), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    os.environ |= {"SLURM_PROCID": str(number % 2), "SLURM_LOCALID": str(number % 2)}
    assert place().launcher == "srun"
    return joined()


def test_two_jobs_whose_numbers_give_one_port_do_not_meet():
    found = run_ranks(4, by_srun, 7, 632, env={"MASTER_ADDR": "127.0.0.1"})
    assert [total for _, total in found] == [3, 3, 3, 3]
    assert {"20448" in found[0][0], "20448" in found[2][0]} == {True, False}, "one of them found it taken"


def test_a_port_that_another_program_has_is_passed_over():
    with socket.create_server(("127.0.0.1", 20000 + 13 * 64)):
        found = run_ranks(2, by_srun, 13, env={"MASTER_ADDR": "127.0.0.1"})
    assert [total for _, total in found] == [3, 3]
    assert f"rendezvous at 127.0.0.1:{20000 + 13 * 64 + 977} (of the job's number)" in found[0][0]


def test_processes_that_an_agent_starts_anew_do_not_meet_those_of_before():
    """Where machines come or go, torchrun's restart count stays, and so does its store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for ranks in (2, 1, 2, 3, 2):
        found = run_ranks(ranks, joined, env={"MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "0"})
        assert [total for _, total in found] == [sum(range(1, ranks + 1))] * ranks


SEATS = [Seat(rank, 4, f"n{rank // 2}", 100 + rank, str(rank), address=f"10.0.0.{rank // 2}") for rank in range(4)]


def test_ranks_that_would_share_a_gpu_are_named():
    seats = [replace(seat, device="cuda", gpu=f"GPU-{min(seat.rank % 2, seat.rank // 2)}") for seat in SEATS]
    problem = judge(seats).problem
    assert "rank 0-1 (on n0) would share the GPU GPU-0" in problem and "n1" not in problem


def test_a_rank_without_a_gpu_among_those_that_have_one_is_named():
    seats = [replace(seat, device="cpu" if seat.rank == 2 else "cuda", gpu=str(seat.rank)) for seat in SEATS]
    assert "rank 2 (on n1) would compute on cpu, the others on cuda" in judge(seats).problem


def test_what_keeps_each_rank_from_computing_is_told_to_all_at_once():
    seats = [replace(seat, problem=f"broken {seat.rank}" if seat.rank > 1 else "") for seat in SEATS]
    problem = judge(seats).problem
    assert "rank 2 (process 102 on n1): broken 2\n  rank 3 (process 103 on n1): broken 3" in problem


def test_rank_0_learns_an_address_on_another_machine():
    assert judge(SEATS).abroad == "10.0.0.1" and judge(SEATS).machines == 2
    assert judge([replace(seat, address="127.0.0.1") for seat in SEATS]).abroad == ""


def test_a_lone_process_that_has_no_device_is_told(monkeypatch):
    with pytest.raises(DistributedError, match="no GPU"):
        rendezvous.meet(Place(), replace(SEATS[0], problem="no GPU"), 1)


def with_others_at(address: str) -> str:
    rendezvous.judge = lambda seats: Word(machines=2, abroad=address)
    total = joined()[1]
    assert total == 3
    return os.environ["GLOO_SOCKET_IFNAME"]


def test_where_rank_0_s_name_leads_to_its_loopback_the_way_to_other_machines_is_taken():
    """As Debian's /etc/hosts has it: 127.0.1.1 for the machine's own name."""
    own = route_to("192.0.2.1")
    if not own:
        pytest.skip("this machine has no way to others")
    found = run_ranks(2, with_others_at, "192.0.2.1", env=OWN | {"MASTER_PORT": free_port()})
    assert found == [interface_of(own)] * 2 and not found[0].startswith("lo")
