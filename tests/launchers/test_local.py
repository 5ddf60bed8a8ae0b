"""Ranks on this machine: how they find each other, how they end together, what is said of it."""

import os
import time
from pathlib import Path

import pytest

from launchers.base import LOST, Ended
from launchers.local import Local

RANK = """
import os, signal, subprocess, sys, time
rank = int(os.environ.get("RANK", 0))
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
print(*(os.environ.get(name, "-") for name in names), flush=True)
"""


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Run the body of a rank; returns the processes and what they print, as (rank, line)."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def start(body: str, processes: int = 2, **options):
        (tmp_path / "a_rank.py").write_text(RANK + body)
        lines: list[tuple[int, str]] = []
        running = Local(**options).start(["a_rank"], processes, lambda rank, line: lines.append((rank, line)))
        return running, lines

    return start


def ended(running, within_s: float = 10) -> Ended:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if result := running.poll():
            return result
        time.sleep(0.01)
    raise AssertionError("the ranks did not end")


def wait_for(lines: list, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(lines) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(lines) >= count


def test_ranks_get_the_variables_of_torchrun_and_share_out_the_cores(ranks):
    running, lines = ranks("")
    assert ended(running) == Ended(0)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(lines) == [(0, f"0 0 2 2 127.0.0.1 {threads}"), (1, f"1 1 2 2 127.0.0.1 {threads}")]


def test_stages_at_the_same_time_have_their_own_devices_and_share_of_the_cores(ranks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert [(part.devices, part.threads) for part in Local().parts(2, processes=2)] == [("0,1", 4), ("2,5", 4)]
    assert [part.devices for part in Local().parts(6, processes=1)] == ["0", "1", "2", "5", "0", "1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert {part.devices for part in Local(devices="7").parts(2, processes=1)} == {"7"}
    running, lines = ranks("print(os.environ['CUDA_VISIBLE_DEVICES'])", processes=1, devices="2,5")
    assert ended(running) == Ended(0) and (0, "2,5") in lines


def test_the_last_words_of_a_rank_are_told_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "a_rank.py").write_text("import sys; print('working'); sys.exit('why it failed')")
    told = []

    def slowly(rank: int, line: str) -> None:
        time.sleep(0.2)
        told.append(line)

    assert ended(Local().start(["a_rank"], 1, slowly)).code == 1
    assert told == ["working", "why it failed"]


def test_one_process_is_not_distributed(ranks):
    running, lines = ranks("", processes=1)
    assert ended(running) == Ended(0)
    assert lines[0][1].startswith("- - - - -")


def test_stopping_early_survives_although_the_ranks_end_one_after_the_other(ranks):
    running, lines = ranks("time.sleep(0.5 * rank); print('written', flush=True); sys.exit(75)")
    assert ended(running) == Ended(75)
    assert [line for _, line in lines].count("written") == 2, "no rank may be killed while it writes its checkpoint"


def test_a_request_to_stop_reaches_every_rank(ranks):
    running, lines = ranks("signal.signal(15, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)")
    wait_for(lines, 4)
    running.stop()
    assert ended(running) == Ended(75)


def test_the_rank_that_failed_first_is_named_and_the_others_end(ranks):
    running, _ = ranks("sys.exit(3) if rank == 1 else time.sleep(60)", grace_s=0.2)
    assert ended(running) == Ended(3, "rank 1 of 2 exited with code 3")


def test_a_killed_process_is_lost_and_told_by_its_signal(ranks):
    running, _ = ranks("os.kill(os.getpid(), 9)", processes=1)
    assert ended(running) == Ended(LOST, "it was killed by SIGKILL; is there enough memory?")


@pytest.mark.parametrize(
    ("rank_1", "expected"),
    [
        ("os.kill(os.getpid(), 7)", Ended(LOST, "rank 1 of 3 was killed by SIGBUS")),
        ("sys.exit(3)", Ended(3, "rank 1 of 3 exited with code 3")),
        ("sys.exit(76)", Ended(LOST, "rank 0 of 3 exited with code 76")),
    ],
)
def test_what_the_others_say_of_a_rank_that_went_counts_for_less_than_how_it_went(ranks, rank_1, expected):
    """They may be the first to end."""
    running, _ = ranks(f"rank == 1 and (time.sleep(0.3), {rank_1}); sys.exit(76)", 3)
    assert ended(running) == expected


def test_killing_takes_what_a_rank_started_with_it(ranks):
    running, lines = ranks("child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()", 1)
    wait_for(lines, 2)
    child = int(lines[1][1])
    running.kill()
    ended(running)
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_port_is_free_to_listen_on(ranks):
    running, lines = ranks(
        "import socket; rank or socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT'])))\n"
    )
    assert ended(running) == Ended(0), lines
