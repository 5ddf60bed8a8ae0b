"""Sweeps of trials that cost nothing: what is proposed, what is ended early, what a kill leaves, what is told."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from conf.errors import OccupiedError
from data_pipeline import artifact
from data_pipeline.artifact import locked
from launchers import preflight
from launchers.sweep import record, run
from launchers.sweep.config import SweepConfig
from launchers.sweep.run import Sweep, SweepError
from launchers.sweep.search.grid import Grid
from launchers.sweep.search.random import Random
from launchers.sweep.search.tpe import TPE
from launchers.sweep.stopping.halving import Halving
from launchers.sweep.stopping.median import Median
from launchers.sweep.stopping.none import Never
from tests.launchers import scripted
from tests.launchers.scripted import STEPS, Scripted, Trial, loss

BOWL = ("lr=log(1e-4,1)", "decay=0,0.1")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Run a sweep in a directory; returns exit code, record and what was shown."""
    monkeypatch.setattr(run, "POLL_S", 0)
    monkeypatch.setattr(record, "drawn", lambda root: "")
    for costly in ("code_commit", "package_versions"):
        monkeypatch.setattr(artifact, costly, lambda: "not asked")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(
        preflight, "answers", lambda calls: {c.stage: preflight.Answer(groups=["experiment"]) for c in calls}
    )

    def start(*settings: str, launcher=None, **options):
        root = tmp_path / options.get("name", "sweep")
        options = {"search": Random(), "stopping": Never(), "trials": 6, **options}
        command = ["launchers.sweep", *(settings or BOWL)]
        best = str(root / "experiment" / "best.yaml")
        config = SweepConfig(root=str(root), command=command, launcher=launcher or Scripted(), best=best, **options)
        assert config.problems() == []
        with locked(root):
            it = Sweep(config)
            it.display.console = Console(file=io.StringIO(), width=300)
            try:
                code = it.run()
            finally:
                start.shown = it.display.console.file.getvalue()
        return code, json.loads((root / "sweep.json").read_text()), start.shown

    start.root = tmp_path / "sweep"
    return start


def params(found) -> dict[int, dict]:
    return {trial["number"]: trial["params"] for trial in found["trials"]}


def states(found) -> dict[int, str]:
    return {trial["number"]: trial["state"] for trial in sorted(found["trials"], key=lambda trial: trial["number"])}


class Killed(BaseException):
    """Stands for SIGKILL: no line of the sweep runs after it."""


def test_the_same_seed_and_space_give_the_same_trials_in_any_other_directory(sweep):
    for name, search in {"random": Random(), "tpe": TPE(startup=2), "grid": Grid(points=2)}.items():
        first = sweep(search=search, trials=4, name=name)[1]
        again = sweep(search=search, trials=4, name=f"{name}-again")[1]
        assert params(first) == params(again) and len(params(first)) == 4
    assert params(sweep(name="other", trials=4, seed=1)[1]) != params(sweep(name="random", trials=4)[1])


def test_a_grid_is_every_combination_once_in_order(sweep):
    code, found, _ = sweep("lr=log(1e-3,1e-1)", "decay=0,0.5", search=Grid(points=3))
    values = [(trial["lr"], trial["decay"]) for _, trial in sorted(params(found).items())]
    assert code == 0
    assert values == [(pytest.approx(lr), decay) for lr in (1e-3, 1e-2, 1e-1) for decay in ("0", "0.5")]


def test_the_proposals_of_the_estimator_come_closer_than_its_random_start(sweep):
    found = sweep("lr=log(1e-4,1)", "decay=0,0.1", search=TPE(startup=6), trials=18)[1]
    away = [loss(trial["lr"], float(trial["decay"]), 1) - 1 for _, trial in sorted(params(found).items())]
    assert sum(away[12:]) < sum(away[:6]) / 2


def test_table_and_record_go_from_the_best_to_the_worst(sweep):
    code, found, shown = sweep(stopping=Median(startup=2))
    assert code == 0
    done = [trial["value"] for trial in found["trials"] if trial["state"] == "done"]
    assert done == sorted(done) and found["best"] == found["trials"][0]["number"]
    rows = list(csv.DictReader((sweep.root / "table.csv").open()))
    assert [int(row["trial"]) for row in rows] == [trial["number"] for trial in found["trials"]]
    assert float(rows[0]["validation_loss"]) == pytest.approx(done[0])
    table = shown[shown.index("trial  ") :]
    assert table.index(f"{rows[0]['trial']:0>3}") < table.index(f"{rows[-1]['trial']:0>3}")
    assert f"The best is trial {found['best']:03d}" in shown


def test_more_is_better_where_that_is_asked_for(sweep):
    found = sweep(maximise=True)[1]
    values = [trial["value"] for trial in found["trials"]]
    assert values == sorted(values, reverse=True) and found["best"] == found["trials"][0]["number"]


def test_a_trial_worse_than_the_median_is_ended_at_that_step_and_no_other_is(sweep):
    found = sweep(stopping=Median(startup=2, first=2), trials=12)[1]
    trials = sorted(found["trials"], key=lambda trial: trial["number"])
    finished: list[dict] = []
    for trial in trials:
        curve = {int(step): value for step, value in trial["curve"].items()}
        behind = None
        for step in sorted(curve):
            others = sorted(other["curve"][str(step)] for other in finished)
            middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2 if others else 0
            if (
                behind is None
                and len(finished) >= 2
                and step >= 2
                and min(curve[s] for s in curve if s <= step) > middle
            ):
                behind = step
        assert trial["state"] == ("done" if behind is None else "pruned")
        assert max(curve) == (behind or STEPS)
        finished += [trial] if behind is None else []
    assert {"done", "pruned"} == set(states(found).values())


def test_a_trial_that_is_done_before_it_is_looked_at_counts_however_it_began(sweep, monkeypatch):
    monkeypatch.setattr(scripted, "Trial", scripted.Fast)
    found = sweep(stopping=Median(startup=2, first=2), trials=12)[1]
    assert set(states(found).values()) == {"done"}


@dataclass
class Waiting(Scripted):
    """Has a queue, in which nothing was put ahead."""

    detach: bool = False
    withdrawn: list[str] = field(default_factory=list)

    def ahead(self, stages):
        return {}

    def together(self, name, stages, at_once):
        return ""

    def withdraw(self, now):
        pass

    def end(self, directory, now=False):
        self.withdrawn.append(directory.name)


def test_a_trial_that_was_to_be_ended_when_the_sweep_was_killed_is_taken_out_of_the_queue(sweep, monkeypatch):
    def killed(trial):
        raise Killed

    options = {"launcher": Waiting(), "search": TPE(startup=8), "stopping": Median(startup=2, first=2), "trials": 12}
    stop = Trial.stop
    monkeypatch.setattr(Trial, "stop", killed)
    with pytest.raises(Killed):
        sweep(**options)
    monkeypatch.setattr(Trial, "stop", stop)
    found = sweep(**options)[1]
    [number] = options["launcher"].withdrawn
    assert states(found)[int(number)] == "pruned" and set(states(found).values()) == {"done", "pruned"}


def test_halving_lets_one_in_so_many_of_those_that_came_to_a_step_go_on(sweep):
    found = sweep(stopping=Halving(first=2, keep_one_in=2), trials=12)[1]
    last = [max(map(int, trial["curve"])) for trial in found["trials"]]
    assert set(last) <= {2, 4, 8} and last.count(8) <= 6 and 2 in last


def test_a_sweep_that_was_killed_ends_as_one_that_was_not(sweep, monkeypatch):
    options = {"search": TPE(startup=2), "stopping": Median(startup=2), "trials": 8}
    undisturbed = sweep(name="undisturbed", **options)[1]
    poll, looks = Trial.poll, 0

    def killing(trial):
        nonlocal looks
        looks += 1
        if looks % 7 == 0:
            raise Killed
        return poll(trial)

    monkeypatch.setattr(Trial, "poll", killing)
    kills, launcher = 0, Scripted()
    while True:
        try:
            killed = sweep(launcher=launcher, **options)[1]
            break
        except Killed:
            kills += 1
    assert kills > 3
    keys = ("number", "params", "state", "value", "curve", "steps")
    assert [[trial[key] for key in keys] for trial in killed["trials"]] == [
        [trial[key] for key in keys] for trial in undisturbed["trials"]
    ]
    lines = (sweep.root / "000" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * STEPS, "a trial goes on in its directory, it does not begin anew"


def test_a_journal_cut_inside_a_line_with_its_lock_held_is_gone_on_with(sweep):
    sweep(trials=2)
    journal = sweep.root / "journal.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":4,"wor')
    (sweep.root / "journal.log.lock").symlink_to(journal)
    code, found, _ = sweep(trials=4)
    assert code == 0 and states(found) == dict.fromkeys(range(4), "done")


def test_a_finished_sweep_starts_nothing_and_shows_its_table_and_more_trials_may_be_asked_for(sweep):
    before = sweep(trials=3)[1]
    launcher = Scripted()
    _, after, shown = sweep(trials=3, launcher=launcher)
    assert after == before and not launcher.started and "The best is trial" in shown
    more = sweep(trials=5, launcher=launcher)[1]
    assert len(launcher.started) == 2 and params(before).items() <= params(more).items()


def test_another_sweep_is_refused_in_the_directory_of_one(sweep):
    sweep(trials=2)
    with pytest.raises(OccupiedError) as refused:
        sweep("lr=log(1e-4,1)", "decay=0,0.2", trials=2, seed=3)
    assert "space.decay: '0,0.1' there, '0,0.2' now" in str(refused.value) and "seed: 0 there, 3 now" in str(
        refused.value
    )


def test_trials_run_at_the_same_time_and_no_more_than_asked_for(sweep, monkeypatch):
    at_once = []
    start = Scripted.start

    def counting(launcher, *arguments):
        at_once.append(1 + sum(trial._done() < STEPS for trial in launcher.live))
        return start(launcher, *arguments)

    monkeypatch.setattr(Scripted, "start", counting)
    code, found, _ = sweep(concurrent=3, trials=7)
    assert code == 0 and max(at_once) == 3 and len(params(found)) == 7


def test_a_failed_trial_is_named_with_its_last_lines_and_the_others_are_run(sweep):
    code, found, shown = sweep(*BOWL, "behaviour=well,fails", search=Grid(points=2), trials=8)
    assert code == 0 and list(states(found).values()) == ["done", "failed"] * 4
    assert "001 failed: it exited with code 1" in shown and "why it failed" in shown


def test_a_trial_that_failed_is_tried_again_at_the_next_start(sweep):
    settings = (*BOWL, "behaviour=fails once")
    with pytest.raises(SweepError, match="2 trials failed; max_failures=2"):
        sweep(*settings, trials=4, max_failures=2)
    found = json.loads((sweep.root / "sweep.json").read_text())
    assert states(found) == {0: "failed", 1: "failed"}, "nothing is started after so many failures"
    for number in range(4):
        (sweep.root / f"{number:03d}").mkdir(exist_ok=True)
        (sweep.root / f"{number:03d}" / "mended").touch()
    code, after, _ = sweep(*settings, trials=4, max_failures=2)
    assert code == 0 and states(after) == dict.fromkeys(range(4), "done")
    assert params(found).items() <= params(after).items()


def test_a_trial_that_stops_early_with_a_checkpoint_is_started_again(sweep):
    launcher = Scripted()
    code, found, shown = sweep(*BOWL, "behaviour=preempted", launcher=launcher, trials=2)
    assert code == 0 and states(found) == {0: "done", 1: "done"} and len(launcher.started) == 4
    assert "stopped early with a checkpoint" in shown


def test_a_figure_that_is_not_a_number_fails_the_trial_and_is_no_best(sweep):
    code, found, shown = sweep(*BOWL, "behaviour=well,diverges", search=Grid(points=2), trials=8)
    assert code == 0 and list(states(found).values()) == ["done", "failed"] * 4
    assert "validation_loss is not a number" in shown


@pytest.mark.filterwarnings("error")
def test_a_diverged_trial_is_ended_by_the_median(sweep):
    found = sweep(*BOWL, "behaviour=well,diverges", search=Grid(points=2), trials=8, stopping=Median(startup=1))[1]
    diverged = [trial for trial in found["trials"] if trial["params"]["behaviour"] == "diverges"]
    assert {trial["state"] for trial in diverged} == {"pruned"} and {trial["value"] for trial in diverged} == {None}


def test_a_figure_that_no_trial_has_ends_the_sweep_at_once_and_can_then_be_mended(sweep):
    launcher = Scripted()
    with pytest.raises(SweepError, match=r"no figure 'validation_los'.*did you mean validation_loss"):
        sweep(figure="validation_los", launcher=launcher)
    assert len(launcher.started) == 1
    code, found, _ = sweep(figure="validation_loss", launcher=launcher)
    assert code == 0 and len(params(found)) == 6
    with pytest.raises(OccupiedError, match="figure"):
        sweep(figure="loss")


def test_the_figure_may_be_inside_another_of_the_manifest(sweep):
    _, found, shown = sweep(figure="shares.data", trials=2, stopping=Median())
    assert {trial["value"] for trial in found["trials"]} == {0.25}
    assert "before its end, so none could be ended early" in shown


def test_a_request_to_stop_leaves_trials_that_are_gone_on_with(sweep, monkeypatch):
    poll = Trial.poll

    def interrupted(trial):
        if trial._done() == 3 and not trial.asked and not (trial.directory / "asked").exists():
            (trial.directory / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return poll(trial)

    monkeypatch.setattr(Trial, "poll", interrupted)
    code, found, shown = sweep(trials=1)
    assert code == 75 and states(found) == {0: "cut"} and "goes on from here" in shown
    code, found, _ = sweep(trials=1)
    assert code == 0 and states(found) == {0: "done"}


def test_what_separates_good_from_bad_is_told_once_there_are_enough_trials(sweep):
    few, many = sweep(trials=4)[1], sweep(trials=12)[1]
    assert few["importance"] == {} and max(many["importance"], key=many["importance"].get) == "lr"


def test_values_that_the_command_refuses_are_told_before_the_first_trial_once_for_each_problem(sweep, monkeypatch):
    def refuse(calls):
        return {c.stage: preflight.Answer("lr=1.0: too much" if "lr=1.0" in c.stage else "") for c in calls}

    monkeypatch.setattr(preflight, "answers", refuse)
    launcher = Scripted()
    with pytest.raises(SweepError, match=r"with lr=1\.0 decay=0 and 1 more:\n  lr=1\.0: too much") as told:
        sweep(launcher=launcher)
    assert not launcher.started and "lr=0.0001" not in str(told.value)


SWEEP = """
import sys
from launchers import preflight
from launchers.local import Local
from launchers.sweep import record
from launchers.sweep.__main__ import main
from launchers.sweep.config import SweepConfig
from launchers.sweep.search.tpe import TPE
from launchers.sweep.stopping.median import Median

preflight.answers = lambda calls: {call.stage: preflight.Answer() for call in calls}
record.drawn = lambda root: ""
root = sys.argv[1]
how = {"search": TPE(startup=2), "stopping": Median(startup=2), "launcher": Local(), "trials": 5}
command = ["bowl_trial", "lr=log(1e-4,1)"]
sys.exit(main(SweepConfig(root=root, command=command, best=f"{root}/experiment/b.yaml", **how), {}))
"""


@pytest.mark.slow
def test_a_sweep_of_processes_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    here = Path(__file__).parent
    environment = dict(os.environ, PYTHONPATH=f"{here.parent.parent}:{here}")

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", SWEEP, str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start("undisturbed").wait(120) == 0
    wait_s = random.Random(0)
    for _ in range(5):
        process = start("killed")
        time.sleep(wait_s.uniform(1, 4))
        process.kill()
        process.wait()
    assert start("killed").wait(120) == 0
    both = [json.loads((tmp_path / name / "sweep.json").read_text())["trials"] for name in ("undisturbed", "killed")]
    keys = ("number", "params", "state", "value", "curve", "steps")
    first, second = ([[trial[key] for key in keys] for trial in trials] for trials in both)
    assert first == second
