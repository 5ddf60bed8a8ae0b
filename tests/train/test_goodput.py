"""A run's wall time is accounted for, over kills and restarts, and what was trained in vain is not called useful."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data_pipeline.artifact import Artifact
from tests.train.runs import begin, until
from tools.goodput import GoodputConfig, NoAttemptsError, ending, main
from train.goodput import WRITTEN_S, Attempt, Ledger, account, age_s, read
from train.throughput import MARKS, Clock

RUN = ("stage.steps=60", "stage.checkpoint_every=5", "stage.validate_every=20", "model.hidden=256")


@dataclass
class Killed:
    """A run that was killed twice and then ended, with a stopwatch of the test's own around it."""

    run_dir: Path
    wall_s: float
    dead_s: float
    output: str


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory) -> Killed:
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    begin(corpus, run_dir.with_name("warm"), "dry_run=true").wait()  # the server that forks the ranks has started
    start, dead_s = time.monotonic(), 0.0
    for number in (1, 2):
        running = begin(corpus, run_dir, *RUN)
        until(lambda number=number: [a for a in read(run_dir) if a.number == number and a.spans], running)
        running.kill()
        before = time.monotonic()
        time.sleep(0.5)
        dead_s += time.monotonic() - before
    running = begin(corpus, run_dir, *RUN)
    assert running.wait() == [0], running.output()
    return Killed(run_dir, time.monotonic() - start, dead_s, running.output())


def test_the_seconds_of_a_run_that_was_killed_twice_add_up_to_its_wall_time(killed):
    found = account(read(killed.run_dir))
    assert len(found.shares) == 3
    assert sum(found.seconds.values()) == pytest.approx(killed.wall_s, rel=0.01)
    assert found.wall_s == pytest.approx(killed.wall_s, rel=0.01)


def test_a_kill_costs_the_record_no_more_than_what_came_since_the_last_write(killed):
    down = account(read(killed.run_dir)).seconds["down"]
    assert killed.dead_s <= down <= killed.dead_s + 2 * (WRITTEN_S + 0.5)


def test_the_steps_that_were_trained_again_are_the_ones_that_are_lost(killed):
    first, second, third = account(read(killed.run_dir)).shares
    assert first.first == 0 and third.last == 60 and third.lost == 0 and third.seconds["lost"] == 0
    for share, after in ((first, second), (second, third)):
        assert after.first % 5 == 0 and share.lost == max(0, share.last - after.first)
        assert share.attempt.exit is None and (share.seconds["lost"] > 0 or share.lost == 0)


def test_the_end_of_the_run_and_its_manifest_tell_the_goodput(killed):
    goodput = Artifact.read(killed.run_dir).metrics["goodput"]
    assert f"goodput {goodput:.1%}" in killed.output and "over 3 attempts" in killed.output
    assert 0 < account(read(killed.run_dir)).goodput <= goodput  # closing is no training


def test_the_report_shows_every_attempt_and_where_the_time_went(killed, capsys):
    for path in (killed.run_dir, killed.run_dir.parent):
        assert main(GoodputConfig(str(path)), {}) == 0
        shown = capsys.readouterr().out
        for part in ("run: goodput", "killed or lost", "0 done", "lost: down", "overhead: init", "of it for restarts"):
            assert part in shown, shown


def test_a_directory_without_runs_is_told_as_such(tmp_path):
    with pytest.raises(NoAttemptsError, match=r"run_dir of a run"):
        main(GoodputConfig(str(tmp_path)), {})


def attempt(number, began_s, first, last, step_s=1.0, init_s=10.0, **facts) -> Attempt:
    trained = (last - first) * step_s
    wall_s = init_s + trained
    seconds = {"init": init_s, "data": 0.25 * trained, "compute": 0.75 * trained, "communication": 0.0}
    spans = [[(first, 0.0), (last, trained)]] if last > first else []
    return Attempt(number, "a run", "here", "", 0, 1, began_s, began_s + wall_s, seconds, spans, **facts)


def test_goodput_is_the_kept_steps_over_the_time_since_the_first_attempt_began():
    found = account([attempt(1, 0, 0, 50), attempt(2, 100, 40, 90), attempt(3, 160, 90, 100, exit=0)])
    assert found.wall_s == 180 and found.lost_steps == 10
    assert found.seconds == pytest.approx(
        {"init": 30, "data": 25, "compute": 75, "communication": 0, "lost": 10, "skipped": 0, "down": 40}
    )
    assert found.goodput == pytest.approx(100 / 180)
    assert found.restarts_s == pytest.approx(10 + 40 + 20)


def test_an_attempt_that_never_trained_loses_nothing_and_costs_its_time():
    found = account([attempt(1, 0, 0, 50, exit=75), attempt(2, 60, 0, 0, exit=1), attempt(3, 70, 50, 60, exit=0)])
    assert found.lost_steps == 0 and found.seconds["init"] == 30 and found.shares[1].first is None
    assert found.useful_s == pytest.approx(60)


def test_what_a_later_attempt_went_further_back_for_is_lost_of_all_before_it():
    found = account([attempt(1, 0, 0, 30), attempt(2, 40, 20, 40), attempt(3, 70, 10, 50, exit=0)])
    assert [share.lost for share in found.shares] == [20, 20, 0]
    assert found.useful_s == pytest.approx(10 + 40)


def test_skipped_steps_are_lost_unless_they_were_trained_again_anyway():
    found = account([attempt(1, 0, 0, 30, skipped=[5, 25]), attempt(2, 40, 20, 40, skipped=[30, 31], exit=0)])
    assert [share.skipped for share in found.shares] == [1, 2]
    assert found.seconds["lost"] == pytest.approx(10) and found.seconds["skipped"] == pytest.approx(3)
    assert found.useful_s == pytest.approx(20 - 1 + 20 - 2)


def test_the_step_that_a_kill_cut_off_is_lost():
    cut = attempt(1, 0, 0, 20)
    cut.seconds["compute"] += 0.5
    cut.alive_s += 0.5
    found = account([cut, attempt(2, 40, 20, 30, exit=0)])
    assert found.lost_steps == 0 and found.seconds["lost"] == pytest.approx(0.5)


@pytest.mark.parametrize(("facts", "lost"), [({}, 5), ({"exit": 1}, 5), ({"exit": 75}, 0), ({"exit": 0}, 0)])
def test_of_the_last_attempt_what_no_checkpoint_holds_is_lost_unless_it_ended_with_one(facts, lost):
    found = account([attempt(1, 0, 0, 50, committed=40), attempt(2, 70, 40, 95, committed=90, **facts)])
    assert [share.lost for share in found.shares] == [10, lost]
    assert found.useful_s == pytest.approx(95 - lost) and found.seconds["lost"] == pytest.approx(10 + lost)
    assert account([attempt(1, 0, 0, 50)]).lost_steps == 50, "there is none"


def test_attempts_that_did_not_come_to_train_leave_the_one_before_them_the_last():
    found = account([attempt(1, 0, 0, 50, committed=40), attempt(2, 70, 40, 40, committed=40, exit=1)])
    assert found.lost_steps == 10


def test_going_back_within_a_process_loses_what_was_trained_since(monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    clock = Clock(torch.device("cpu"))
    clock.turn("compute")
    for number in (0, 1, 2, 3, 1, 2, 3, 4):
        with clock.step(number):
            pass
    assert [[step for step, _ in span] for span in clock.spans] == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]
    spent = clock.spent()
    one = Attempt(1, "a run", "here", "", 0, 1, 0.0, sum(spent.values()), spent, clock.spans, exit=0)
    found = account([one])
    assert found.lost_steps == 3 and found.seconds["lost"] == pytest.approx(clock.spans[0][4][1] - clock.spans[0][1][1])
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)


def test_a_moment_counts_once_for_the_innermost_block(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"), age_s=7.0)
    now[0] += 1
    clock.turn("compute")
    now[0] += 2
    with clock.on("evaluation"):
        now[0] += 4
        with clock.on("checkpoint"):
            now[0] += 8
        now[0] += 16
    spent = clock.spent()
    assert spent == {"init": 8, "compute": 2, "communication": 0, "data": 0, "evaluation": 20, "checkpoint": 8}
    assert sum(spent.values()) == clock.total_s


def test_a_long_run_remembers_few_steps_and_the_newest_exactly():
    clock = Clock(torch.device("cpu"))
    for number in range(5000):
        with clock.step(number):
            pass
    (span,) = clock.spans
    assert len(span) <= MARKS and span[0] == (0, 0.0)
    assert [step for step, _ in span[-MARKS // 2 :]] == list(range(5001 - MARKS // 2, 5001))


def test_records_of_another_run_in_the_directory_are_none_of_this_ones(tmp_path):
    for run, codes in (("one", (None, 1)), ("other", (75, 0))):
        for code in codes:
            with Ledger() as ledger:
                ledger.open(tmp_path, run, 1)
                ledger.ends(code)
    assert [(a.number, a.run, a.exit) for a in read(tmp_path)] == [(1, "other", 75), (2, "other", 0)]


@pytest.mark.parametrize(("error", "code"), [(SystemExit(3), 3), (KeyboardInterrupt(), 130), (ValueError(), 1)])
def test_an_attempt_that_fails_records_its_exit_code(tmp_path, error, code):
    with pytest.raises(type(error)), Ledger() as ledger:
        ledger.open(tmp_path, "a run", 1)
        raise error
    assert [one.exit for one in read(tmp_path)] == [code]


def test_a_record_that_cannot_be_written_or_read_stops_nothing(tmp_path, monkeypatch, capsys):
    def refuse(file, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.goodput.write_atomically", refuse)
    with Ledger() as ledger:
        ledger.open(tmp_path, "a run", 1)
    assert capsys.readouterr().err.count("not accounted for") == 1
    (tmp_path / "attempts" / "000001.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"left out of the account"):
        assert read(tmp_path) == []


def test_the_life_of_a_process_before_its_first_run_counts_once(monkeypatch):
    monkeypatch.setattr("train.goodput._counted", False)
    assert age_s() > 0 and age_s() == 0


def test_an_attempt_under_way_is_told_from_one_that_was_killed():
    one = attempt(1, time.time() - 11, 0, 1)
    assert ending(one, last=True) == "under way" and ending(one, last=False) == "killed or lost"
    one.alive_s -= 60
    assert ending(one, last=True) == "killed or lost"
    assert json.loads(json.dumps(one.spans)) == [[[0, 0.0], [1, 1.0]]]
