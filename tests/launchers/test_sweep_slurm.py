"""A sweep on a real Slurm: one array job, whose elements are looked at, ended early and told as local trials are."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.artifact import locked
from launchers import preflight
from launchers.queue import Slurm
from launchers.slurm.jobs import Record
from launchers.sweep import record
from launchers.sweep.config import SweepConfig
from launchers.sweep.run import Sweep
from launchers.sweep.search.grid import Grid
from launchers.sweep.stopping.median import Median
from launchers.sweep.stopping.none import Never
from tests.slurm import Cluster

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def swept(root: Path, monkeypatch, **options):
    """Run a sweep whose trials are elements of an array; returns exit code, record and what was shown."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{HERE}")
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(preflight, "answers", lambda calls: {call.stage: preflight.Answer() for call in calls})
    monkeypatch.setattr(record, "drawn", lambda root: "")
    command = ["bowl_trial", "lr=0.01,0.02,0.0001,0"]
    options = {"search": Grid(), "stopping": Median(startup=2), **options}
    best = str(root / "experiment" / "best.yaml")
    config = SweepConfig(root=str(root), command=command, best=best, trials=4, **options)
    assert config.problems() == []
    with locked(root):
        sweep = Sweep(config)
        sweep.display.console = Console(file=io.StringIO(), width=300)
        code = sweep.run()
    return code, json.loads((root / "sweep.json").read_text()), sweep.display.console.file.getvalue()


def test_a_grid_is_one_array_job_whose_elements_are_judged_one_by_one(slurm: Cluster, monkeypatch, tmp_path):
    slurm.clear()
    root = tmp_path / "sweep"
    code, found, shown = swept(root, monkeypatch, launcher=Slurm(time="5", poll_s=0.3))
    assert code == 0, shown
    states = {trial["number"]: trial["state"] for trial in found["trials"]}
    assert states == {0: "done", 1: "done", 2: "pruned", 3: "failed"}, shown
    job = re.search(r"job (\d+): 4 trials", shown)[1]
    assert [Record.read(root / f"{number:03d}").jobs for number in range(4)] == [[f"{job}_{n}"] for n in range(4)]
    ended = {number: slurm.job(f"{job}_{number}") for number in range(4)}
    assert [ended[number]["JobState"] for number in (0, 1, 3)] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert (root / "002" / "checkpoint").exists() and not (root / "002" / "manifest.json").exists()
    assert "why it failed" in shown and not slurm.jobs()


@pytest.mark.slow
def test_a_detached_sweep_goes_on_by_itself_and_is_looked_at_later(slurm: Cluster, monkeypatch, tmp_path):
    slurm.clear()
    root = tmp_path / "sweep"
    how = {"launcher": Slurm(time="5", poll_s=0.3, detach=True), "concurrent": 4, "stopping": Never()}
    code, found, shown = swept(root, monkeypatch, **how)
    assert code == 0 and {trial["state"] for trial in found["trials"]} == {"cut"}
    job = re.search(r"job (\d+): 4 trials", shown)[1]
    for number in range(4):
        slurm.wait(f"{job}_{number}", "COMPLETED", "FAILED")
    code, found, shown = swept(root, monkeypatch, launcher=Slurm(time="5", poll_s=0.3), stopping=Never())
    assert code == 0 and {trial["number"] for trial in found["trials"] if trial["state"] == "done"} == {0, 1, 2}
