"""A sweep of real runs: what they report is what is compared, and the best is an experiment that trains again."""

import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from conf import entry
from data_pipeline.artifact import Artifact, locked
from launchers import preflight
from launchers.base import Ended, Output
from launchers.sweep import run
from launchers.sweep.__main__ import with_command
from launchers.sweep.config import SweepConfig
from launchers.sweep.run import Sweep
from launchers.sweep.search.grid import Grid
from launchers.sweep.stopping.median import Median
from tests.data import tiny_corpus
from tests.train import runs
from train.__main__ import main as train_main
from train.config import RunConfig


@dataclass
class Forked:
    """Trials forked from the warm server: seconds instead of tens of them."""

    logs: Path

    def start(self, command: Sequence[str], processes: int, output: Output) -> "ForkedTrial":
        settings = [text for text in command[1:] if not text.startswith("run_dir=")]
        [run_dir] = {text.partition("=")[2] for text in command} - {text.partition("=")[2] for text in settings} - {""}
        return ForkedTrial(runs.begin(None, Path(run_dir), *settings, ranks=processes, logs=self.logs))


@dataclass
class ForkedTrial:
    ranks: runs.Running

    def poll(self) -> Ended | None:
        return None if self.ranks.alive else Ended(max(self.ranks.wait()))

    def stop(self) -> None:
        self.ranks.signal(15)

    def kill(self) -> None:
        self.ranks.kill()


def answered_here(calls: list[preflight.Check]) -> dict[str, preflight.Answer]:
    """Without a process of its own, which would import torch again."""
    GlobalHydra.instance().clear()
    return {call.stage: preflight._answer(call) for call in calls}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three learning rates; the last one falls behind."""
    here = tmp_path_factory.mktemp("swept")
    corpus = tiny_corpus(here / "corpus", documents=60)
    command = ["train", f"data.path={corpus}", *runs.SETTINGS, "schedule=constant", "logger=[console,jsonl]"]
    command += ["stage.steps=20", "stage.validate_every=5", "optim.lr=0.01,0.003,0.000001", "name='${stage.kind} it'"]
    root = here / "sweep"
    options = {"search": Grid(), "stopping": Median(startup=2), "best": str(root / "experiment" / "found.yaml")}
    config = SweepConfig(root=str(root), command=command, launcher=Forked(here), **options)
    assert config.problems() == []
    with pytest.MonkeyPatch.context() as patch, locked(root):
        patch.setattr(run, "POLL_S", 0.02)
        patch.setattr(preflight, "answers", answered_here)
        sweep = Sweep(config)
        sweep.display.console = Console(file=io.StringIO(), width=200)
        code = sweep.run()
    assert code == 0, sweep.display.console.file.getvalue()
    return root, json.loads((root / "sweep.json").read_text()), sweep.display.console.file.getvalue()


def test_what_is_compared_is_what_the_manifest_says(swept):
    root, record, _ = swept
    done = [trial for trial in record["trials"] if trial["state"] == "done"]
    assert {trial["number"] for trial in done} == {0, 1}
    for trial in done:
        metrics = Artifact.read(root / f"{trial['number']:03d}").metrics
        assert trial["value"] == metrics["validation_loss"] and trial["steps"] == metrics["steps"] == 20
        assert [int(step) for step in trial["curve"]] == [0, 5, 10, 15, 20]


def test_a_trial_that_falls_behind_stops_with_a_checkpoint_and_makes_no_artifact(swept):
    root, record, _ = swept
    [pruned] = [trial for trial in record["trials"] if trial["state"] == "pruned"]
    assert pruned["params"] == {"optim.lr": "1e-06"} and list(pruned["curve"]) == ["0", "5"]
    assert list((root / "002" / "checkpoints").glob("step-*")) and not (root / "002" / "manifest.json").exists()


def test_the_best_is_an_experiment_of_exactly_that_trial(swept, monkeypatch, capsys):
    root, record, _ = swept
    arguments = ["--config-dir", str(root), "experiment=found", "--cfg", "job", "--resolve"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    GlobalHydra.instance().clear()
    entry.run("train", RunConfig, train_main)
    composed = yaml.safe_load(capsys.readouterr().out)
    trained = yaml.safe_load((root / f"{record['best']:03d}" / "config.yaml").read_text())
    for group in trained.values():
        if isinstance(group, dict):
            group.pop("option", None)  # added by the run: a class, not a value
    assert (composed.pop("name"), composed.pop("run_dir")) == ("sweep_best", "runs/sweep_best")
    assert (trained.pop("name"), trained.pop("run_dir")) == ("pretrain it", str(root / f"{record['best']:03d}"))
    assert composed == trained


def test_page_and_picture_show_every_trial_and_load_nothing(swept):
    root, record, shown = swept
    page = (root / "sweep.html").read_text()
    assert "sweep.html and plot.png" in shown and (root / "plot.png").read_bytes().startswith(b"\x89PNG")
    for told in ("Trial 000", "ended early", "experiment=found", "1e-06", "validation_loss over the steps"):
        assert told in page, told
    assert page.count("<tr") == 1 + len(record["trials"])
    assert not re.search(r"<script|<link|(src|href)=.https?:", page)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """`python -m launchers.sweep ...`, dry, in this process; returns exit code and everything said."""
    from launchers.sweep.__main__ import main

    monkeypatch.setattr(preflight, "answers", answered_here)

    def start(*arguments: str):
        given = [f"root={tmp_path}/sweep", "dry_run=true", *arguments]
        monkeypatch.setattr(sys, "argv", ["sweep", *with_command(given)])
        GlobalHydra.instance().clear()
        try:
            entry.run("sweep", SweepConfig, main)
            code = 0
        except SystemExit as end:
            code = end.code
        assert not (tmp_path / "sweep").exists(), "nothing may be written for a sweep that is not run"
        return code, "".join(capsys.readouterr())

    return start


def test_a_dry_run_shows_what_would_be_run(cli):
    code, said = cli("--", "train", "experiment=demo", "optim=adamw,muon")
    assert code == 0 and "20 trials" in said
    assert "python -m train name=sweep/000 experiment=demo optim=adamw run_dir=" in said


def test_the_shipped_sweep_passes_a_dry_run(cli):
    code, said = cli("sweep=demo")
    assert code == 0 and "12 trials" in said


def test_an_unknown_key_is_told_with_those_that_are_near(cli):
    code, said = cli("--", "train", "experiment=demo", "optim.lrr=log(1e-4,1e-2)")
    assert code == 1 and "optim.lrr" in said and "Did you mean lr?" in said and "Traceback" not in said


def test_a_value_out_of_range_at_a_corner_of_the_space_is_told(cli):
    code, said = cli("--", "train", "stage.steps=range(0,30,10)")
    assert code == 1 and "with stage.steps=0:" in said and "must be at least 1" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--", "train", "experiment=demo"], "at least one key with the values to try"),
        (["--", "train", "optim.lr=log(0,1e-2)"], "no logarithm of what is not above 0"),
        (["--", "train", "optim.lr=log(1e-2,1e-3)"], "lower end must be below its upper end"),
        (["--", "train", "optim.lr=logg(1e-3,1e-2)"], "Unknown function 'logg'"),
        (["space={optim.lr: 3}", "--", "train"], "one value is nothing to try"),
        (["space={optim.lr: [1, 1]}", "--", "train"], "1 more than once"),
        (["trials=0", "--", "train", "optim.lr=1,2"], "trials=0: 1 or more"),
        (["search=grid", "trials=3", "--", "train", "optim.lr=log(1e-3,1e-2)"], "the grid has 5 combinations"),
        (["--", "optim.lr=1,2"], "a module of ours first"),
        (["--", "train", "run_dir=here", "optim.lr=1,2"], "each trial has a directory of its own"),
        (["--", "train", "~eval", "optim.lr=1,2"], "an experiment cannot take a key away"),
        (["space={optim.lr: [1, 2]}", "--", "train", "optim.lr=3"], "the command sets it too"),
        (["best=conf/experiment/demo.yaml", "--", "train", "optim.lr=1,2"], "this one would be written over"),
        (["stopping=median", "stopping.startup=0", "--", "train", "optim.lr=1,2"], "stopping.startup=0"),
        (["search=tpee", "--", "train", "optim.lr=1,2"], "search/tpee"),
    ],
)
def test_what_is_no_sweep_is_told_in_one_message_before_anything_starts(cli, arguments, told):
    code, said = cli(*arguments)
    assert code == 1 and told in said and "Traceback" not in said
