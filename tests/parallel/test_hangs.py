"""A rank that keeps the others waiting is found in a set time and named; every rank that can says where it stands."""

import ctypes
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import distributed, watch
from parallel.standing import Standing, missing
from parallel.verdict import LongrunError
from tests.ranks import RanksError, run_ranks

COLLECTIVE_S = 4.0
KINDS = ("loops", "holds the interpreter", "skips a collective", "is suspended")


def keep_waiting(kind: str) -> None:
    match kind:
        case "loops":
            while True:
                pass
        case "holds the interpreter":
            ctypes.PyDLL(None).sleep(60)
        case "is suspended":
            os.kill(os.getpid(), signal.SIGSTOP)


def work(kind: str, directory: Path) -> None:
    watch.SUSPICION_S, watch.GRACE_S = 3, 3  # enough for a busy machine
    try:
        with distributed.joined(collective_s=COLLECTIVE_S, patience_s=8) as world:
            distributed.keep_stacks(directory / "stacks")
            own_group = dist.new_group()
            for step in range(3):
                distributed.reached(step)
                if step == 2 and world.rank == 1:
                    time.sleep(1.5 * watch.BEAT_S)  # so that it has said which step it is in
                    keep_waiting(kind)
                else:
                    dist.all_reduce(torch.ones(1))
                began = time.time()
                dist.all_reduce(torch.ones(1), group=own_group)
    except LongrunError as error:
        (directory / str(world.rank)).write_text(f"{time.time() - began - COLLECTIVE_S:.1f} s: {error}")
        time.sleep(5)  # so that none ends before all others have written
        os._exit(error.exit_code)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is found of each kind, all at once: most of it is waiting."""
    directories = {kind: tmp_path_factory.mktemp("hang") for kind in KINDS}

    def run(kind: str) -> None:
        with pytest.raises(RanksError):
            run_ranks(3, work, kind, directories[kind], timeout_s=60)

    with ThreadPoolExecutor() as threads:
        list(threads.map(run, KINDS))
    return directories


SAID = {
    "loops": "hangs: it lives, but did not come to a collective after step 2",
    "holds the interpreter": "is stuck: no sign of life since step 2, but it could write its stack",
    "skips a collective": r"skipped all_reduce \(collective \d+ of group 0\) after step 2",
    "is suspended": "is gone: no sign of life since step 2",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_rank_is_named_to_the_others_within_seconds_of_the_limit(found, kind):
    for rank in ("0", "2"):
        said = (found[kind] / rank).read_text()
        assert re.search(r"rank 1 of 3 \(on .*\) " + SAID[kind], said), said
        assert f"Look at {found[kind]}/stacks/rank-1.txt" in said
        assert float(said.split(" s")[0]) < 3 + 5 * watch.BEAT_S + 10  # SUSPICION_S, and a busy machine


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_that_can_writes_its_stacks(found, kind):
    stacks = {int(file.stem[-1]): file.read_text() for file in (found[kind] / "stacks").glob("rank-*")}
    stood = {rank: stack for rank, stack in stacks.items() if stack}
    assert set(stood) == ({0, 2} if kind == "is suspended" else {0, 1, 2})
    assert "in work" in stood[0] and "all_reduce" in stood[0]
    assert kind in ("is suspended", "skips a collective") or "in keep_waiting" in stood[1]


def test_one_rank_tells_where_all_stand(found):
    told = (found["loops"] / "stacks" / "ranks.txt").read_text()
    assert re.search(r"rank 0, 2: at tests/parallel/test_hangs.py:\d+ in work, in or after all_reduce", told), told
    assert re.search(r"rank 1: at tests/parallel/test_hangs.py:\d+ in keep_waiting", told), told


def waits(group: str, number: int, since: int, **reached: int) -> Standing:
    return Standing("a line", (group, number, "all_reduce"), since, {**reached, group: number})


def test_a_rank_that_went_past_a_collective_is_told_from_those_it_left_waiting():
    """Rank 1 skipped number 5 of a, and waits in number 8 of b for the two that wait for it."""
    standings = {0: waits("a", 5, 10, b=7), 1: waits("b", 8, 12, a=4), 2: waits("a", 5, 11, b=7)}
    assert missing(standings) == ([1], "all_reduce (collective 5 of group a)")


def test_ranks_of_different_groups_that_all_came_are_not_accused():
    assert missing({0: waits("a", 5, 10), 1: waits("a", 5, 11), 2: waits("b", 9, 1), 3: waits("b", 9, 2)}) == ([], "")


def test_a_run_that_is_well_leaves_no_stacks(tmp_path):
    run_ranks(2, leave_well, tmp_path / "stacks" / "1")
    assert not list(tmp_path.iterdir())


def leave_well(directory: Path) -> None:
    with distributed.joined():
        distributed.keep_stacks(directory)
        threading.Event().wait(2.5 * watch.BEAT_S)
