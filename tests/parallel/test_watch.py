"""A rank that dies, hangs or fails is named by the others; one that is slow, or leaves as it should, is not."""

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conf.errors import LongrunError, LostError
from parallel import distributed, watch
from parallel.verdict import HERE, HURT, LEFT, BrokenError, PeerError, Sign, judge
from parallel.watch import Watch
from tests.data import tiny_corpus
from tests.ranks import RanksError, run_ranks
from tests.train.runs import begin, until
from tests.train.test_resume import losses

CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:15595."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), documents=60)


class Ranks:
    """Watches in one process, with quick beats; what a real one would do to its process is noted instead."""

    def __init__(self, size: int):
        self.store = dist.HashStore()
        self.ended: dict[int, str] = {}
        self.watches = [
            Watch(self.store, rank, size, server="the test", serves=False, patience_s=watch.PATIENCE_S)
            for rank in range(size)
        ]
        for one in self.watches:
            one._end = lambda verdict, rank=one.rank: self.ended.update({rank: verdict.text})  # type: ignore

    def silence(self, rank: int) -> None:
        """As if the process were gone: no sign any more, and no last word."""
        self.watches[rank]._closing.set()
        self.watches[rank]._thread.join()

    def until_ended(self, *ranks: int) -> None:
        deadline = time.monotonic() + 10
        while set(self.ended) != set(ranks):
            assert time.monotonic() < deadline, self.ended
            time.sleep(0.01)

    def close(self) -> None:
        for one in self.watches:
            one.close()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ranks]]:
    """Makes `Ranks` of a size."""
    for name, seconds in {"BEAT_S": 0.04, "PATIENCE_S": 0.8, "SUSPICION_S": 0.4, "GRACE_S": 0.1}.items():
        monkeypatch.setattr(watch, name, seconds)
    made: list[Ranks] = []
    yield lambda size: made.append(Ranks(size)) or made[-1]
    for one in made:
        one.close()


def test_a_silent_rank_is_named_to_all_others_with_its_last_step(ranks):
    three = ranks(3)
    three.watches[1].step = 17
    time.sleep(0.1)
    three.silence(1)
    three.until_ended(0, 2)
    assert set(three.ended.values()) == {
        f"rank 1 of 3 (on {socket.gethostname()}) is gone: no sign of life since step 17. "
        "Was it killed, is its machine up, had it memory? Look at the end of its output."
    }


def test_all_ranks_of_a_lost_machine_are_named(ranks):
    five = ranks(5)
    for rank in (3, 2, 1):  # the one that is watched goes last
        five.silence(rank)
    five.until_ended(0, 4)
    assert all("rank 1-3 of 5" in text for text in five.ended.values())


def test_ranks_that_live_or_have_left_are_not_accused(ranks):
    three = ranks(3)
    time.sleep(0.1)
    three.watches[1].close()
    time.sleep(2)
    assert three.ended == {}


def test_a_rank_that_was_suspended_itself_accuses_nobody(ranks, monkeypatch):
    """Its thread stood still for longer than its patience, and so did the world, as it sees it."""
    two = ranks(2)
    say, stalled = two.watches[0]._say, threading.Event()

    def stall():
        if not stalled.is_set():
            stalled.set()
            time.sleep(1.5 * watch.PATIENCE_S)
        say()

    monkeypatch.setattr(two.watches[1], "patience_s", 60)
    two.watches[0]._say = stall
    time.sleep(2)
    assert stalled.is_set() and two.ended == {}


def test_a_broken_connection_shortens_the_wait(ranks):
    three = ranks(3)
    for one in three.watches:
        one.patience_s = 60
    three.silence(2)
    assert "rank 2 of 3" in str(three.watches[0].blame(RuntimeError(CLOSED)))
    three.until_ended(0, 1)


def test_a_rank_that_fails_is_named_with_its_reason_and_keeps_its_own_error(ranks):
    three = ranks(3)
    three.watches[1].step = 4
    assert three.watches[1].blame(ValueError("a reason\nand more")) is None
    three.until_ended(0, 1, 2)
    expected = f"rank 1 of 3 (on {socket.gethostname()}) failed at step 4: ValueError: a reason"
    assert three.ended[0] == expected == str(three.watches[2].blame(RuntimeError(CLOSED)))


def test_ranks_that_wait_for_their_device_look_for_the_one_that_does_not(ranks):
    """A collective on a GPU throws nothing."""
    three = ranks(3)
    for one in three.watches:
        one.collective_s = 0.2
    for rank in (0, 2):
        three.watches[rank].waits_since = time.monotonic()
    three.until_ended(0, 1, 2)
    assert all("rank 1 of 3" in text and "hangs: it lives" in text for text in three.ended.values())


def test_an_exit_is_no_failure(ranks):
    two = ranks(2)
    assert two.watches[1].blame(SystemExit(1)) is None
    time.sleep(1)
    assert two.ended == {}


def test_a_broken_connection_is_seen_through_what_it_led_to(ranks):
    two = ranks(2)
    two.silence(1)
    error = SystemExit(1)
    error.__context__ = LookupError("no checkpoint")
    error.__context__.__cause__ = RuntimeError(CLOSED)
    assert isinstance(two.watches[0].blame(error), PeerError)


def test_a_broken_connection_that_is_nobodys_fault_is_told_as_such(ranks):
    two = ranks(2)
    answers: list[PeerError | None] = []
    others = threading.Thread(target=lambda: answers.append(two.watches[1].blame(RuntimeError(CLOSED))))
    others.start()
    answers.append(two.watches[0].blame(RuntimeError(CLOSED)))
    others.join()
    assert [type(answer) for answer in answers] == [BrokenError, BrokenError]


def test_ranks_that_leave_to_meet_again_may_take_their_time(ranks):
    """What they have open must be closed before."""
    two = ranks(2)
    for one in two.watches:
        one.leaving_s = 60
        one.note(RuntimeError(CLOSED))
    time.sleep(1.5)
    assert two.ended == {}
    assert [type(one.blame(RuntimeError(CLOSED))) for one in two.watches] == [BrokenError, BrokenError]


def test_one_of_many_that_were_thrown_out_looks_for_all(ranks, monkeypatch):
    many, judged = ranks(24), []
    monkeypatch.setattr(watch, "judge", lambda *others: judged.append(others[2][0]) or judge(*others))
    many.silence(20)
    for rank in set(range(24)) - {20}:
        many.watches[rank].note(RuntimeError(CLOSED))
    many.until_ended(*(set(range(24)) - {20}))
    assert len(judged) == 1 and all("rank 20 of 24" in text for text in many.ended.values())


def test_another_rank_takes_the_place_of_one_that_looked_for_all_and_died(ranks):
    four = ranks(4)
    four.store.compare_set(watch.SURVEYOR, "", "1")
    four.silence(1)
    for rank in (0, 2, 3):
        four.watches[rank].note(RuntimeError(CLOSED))
    four.until_ended(0, 2, 3)
    assert all("rank 1 of 4" in text for text in four.ended.values())


def test_a_disk_that_takes_no_stacks_costs_the_stacks_only(ranks, tmp_path):
    two = ranks(2)
    (tmp_path / "file").touch()
    two.watches[0].keep_stacks(tmp_path / "file" / "stacks")
    two.watches[1].keep_stacks(tmp_path / "stacks")
    shutil.rmtree(tmp_path / "stacks")
    time.sleep(1.5 * watch.PATIENCE_S)
    assert two.ended == {}
    two.close()


class AgainError(LongrunError):
    exit_code = LostError.exit_code


def test_an_error_that_starts_the_run_again_does_so_for_the_others(ranks):
    two = ranks(2)
    assert two.watches[0].blame(AgainError("from the start")) is None
    two.until_ended(0, 1)
    assert isinstance(two.watches[1].blame(RuntimeError(CLOSED)), PeerError)


def test_a_mistake_in_a_collective_is_this_ranks_own_error(ranks):
    two = ranks(2)
    assert (
        two.watches[0].blame(RuntimeError("[gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes")) is None
    )
    two.until_ended(0, 1)
    assert "rank 0 of 2" in two.ended[1] and "failed at step 0: RuntimeError" in two.ended[1]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({0: Sign("a", HURT, 5, 9), 1: Sign("b", HERE, 5, 3)}, "rank 1 of 3 (on b) is gone"),
        ({0: Sign("a", HERE, 5, 9), 1: Sign("b", LEFT, 6, 4)}, "rank 1 of 3 (on b) left the run after step 6"),
        ({0: Sign("a", HURT, 5, 9), 1: Sign("b", HERE, 5, 9)}, "rank 1 of 3 (on b) hangs"),
        ({0: Sign("a", HURT, 5, 9), 1: Sign("b", HURT, 5, 9)}, "a collective broke after step 5, though all 3 ranks"),
    ],
)
def test_two_looks_tell_who_is_at_fault(now, expected):
    before = {rank: Sign(sign.host, HERE, 5, 3) for rank, sign in now.items()}
    verdict = judge(before, now, (2, Sign("c", HURT, 5, 9)), 3, None)
    assert verdict is not None and verdict.text.startswith(expected)


def hang_on_rank_1(directory: Path) -> None:
    watch.SUSPICION_S, watch.GRACE_S = 3, 1  # enough for a busy machine
    try:
        with distributed.joined(collective_s=2) as world:
            for step in range(3):
                distributed.reached(step)
                dist.all_reduce(torch.ones(1))
            if world.rank == 1:
                threading.Event().wait(60)
            dist.barrier()
    except PeerError as error:
        (directory / str(world.rank)).write_text(str(error))
        time.sleep(60)  # so that rank 1 is the first to end


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_shows_where_it_stands(tmp_path):
    with pytest.raises(RanksError, match="rank 1 of 3 failed: it died with exit code 76") as failure:
        run_ranks(3, hang_on_rank_1, tmp_path)
    assert "in hang_on_rank_1" in str(failure.value)
    for rank in ("0", "2"):
        assert "rank 1 of 3 (on " in (tmp_path / rank).read_text()
        assert "hangs: it lives, but did not come to a collective after step 2" in (tmp_path / rank).read_text()


def suspend_rank_2() -> None:
    watch.SUSPICION_S, watch.GRACE_S = 3, 1  # enough for a busy machine
    with distributed.joined(patience_s=2) as world:
        if world.rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


def test_ranks_that_wait_for_a_suspended_one_are_ended_and_name_it() -> None:
    with pytest.raises(RanksError, match=r"rank [01] of 3 failed: it died with exit code 76") as failure:
        run_ranks(3, suspend_rank_2)
    assert "error: rank 2 of 3 (on " in str(failure.value)


def leave_one_by_one() -> str:
    with distributed.joined(patience_s=2) as world:
        dist.barrier()
        time.sleep(3 * (world.rank == 2))
    return "done"


def test_ranks_may_leave_one_by_one() -> None:
    assert run_ranks(3, leave_one_by_one) == ["done"] * 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in [(1, False), (2, True)]]


@pytest.mark.parametrize(("killed", "own_store"), [(0, True), *SLOW])
def test_when_a_rank_is_killed_the_others_end_in_seconds_and_name_it(corpus, tmp_path, killed, own_store):
    """Also the rank that serves the store."""
    settings = ("parallel.dp_shard=3", "parallel.zero=2", "stage.global_batch=6", "stage.steps=5000")
    env = {"TORCHELASTIC_USE_AGENT_STORE": "", "MASTER_PORT": str(free_port())} if own_store else {}
    running = begin(corpus, tmp_path / "run", *settings, "stage.checkpoint_every=2", ranks=3, env=env)
    until(lambda: len(losses(tmp_path / "run")) >= 4, running)
    running.signal(signal.SIGKILL, killed)
    codes = running.wait(timeout_s=30)
    assert codes.pop(killed) == -signal.SIGKILL
    assert codes == [PeerError.exit_code] * 2
    for rank in {0, 1, 2} - {killed}:
        assert f"[rank {rank}] error: rank {killed} of 3 (" in running.output(rank), running.output(rank)
        assert "Traceback" not in running.output(rank), running.output(rank)
