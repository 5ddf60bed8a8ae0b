"""What a user reads: help, misspelt keys, every problem at once."""

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from conf import entry
from conf.errors import ConfigError, Problem
from conf.registry import OPTIONS
from train.__main__ import main
from train.config import RunConfig

CONF = Path(entry.__file__).parent
for tool in (
    "annotate",
    "bench",
    "chat",
    "dependencies",
    "goodput",
    "inspect.__main__",
    "lineage",
    "parity.__main__",
    "report.__main__",
    "serve",
    "sweep_report.__main__",
    "tokenizer",
):
    importlib.import_module(f"tools.{tool}")
importlib.import_module("launchers.lifecycle")
importlib.import_module("launchers.slurm.resources")
importlib.import_module("launchers.sweep.config")
importlib.import_module("data_pipeline.config")


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """`python -m train ...`, in this process: importing torch a dozen times over takes a minute."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        GlobalHydra.instance().clear()
        try:
            entry.run("train", RunConfig, main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    return run


def test_a_misspelt_key_is_refused_with_the_nearest_one(run):
    result = run("stage.stepz=3")
    assert result.returncode == 1
    assert "stage.stepz" in result.stderr and "Did you mean steps?" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_option_is_refused_with_those_that_exist(run):
    result = run("optim=adamv")
    assert result.returncode == 1
    assert "optim/adamv" in result.stderr and "muon" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_value_in_the_place_of_an_option_is_refused(run):
    result = run("parallel=2")
    assert result.returncode == 1
    assert "Got int" in result.stderr and "optim=muon" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_no_key_is_called_like_a_group_that_would_hide_it(file):
    schema, *groups = yaml.safe_load(file.read_text())["defaults"]
    chosen = {key.removeprefix("optional ") for entry in groups if isinstance(entry, dict) for key in entry}
    keys = {field.name for field in dataclasses.fields(OPTIONS["", schema])}
    assert not (keys & {group.split("/")[0] for group, _ in OPTIONS}) - chosen


def test_a_value_of_the_wrong_type_is_refused_with_its_key(run):
    result = run("stage.steps=many")
    assert result.returncode == 1
    assert "stage.steps" in result.stderr and "many" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_problem_is_named_at_once_with_key_value_and_fix(run, tmp_path):
    result = run(
        f"run_dir={tmp_path}/run", "parallel.dp_shard=3", "parallel.schedule=zbw", "parallel.zero=7", "resume=maybe"
    )
    assert result.returncode == 1
    for part in ("parallel.dp_shard=3", "parallel.schedule=zbw", "parallel.zero=7", "resume=maybe"):
        assert part in result.stderr, part
    assert not (tmp_path / "run").exists(), "nothing may be written for a configuration that is refused"


def test_help_documents_every_key_with_its_default(run):
    result = run("--help")
    assert result.returncode == 0
    assert "clip: float = 1.0" in result.stdout and "largest global gradient norm" in result.stdout
    for option in ("objective=clm", "optim=muon", "schedule=cosine", "engine=native", "logger=jsonl"):
        assert f"-- {option}" in result.stdout, option


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "evaluate", "export", "verify", "preflight"])
def test_the_composed_configuration_can_be_shown_for_every_stage(run, stage):
    result = run(f"stage={stage}", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "run_dir:" in result.stdout


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, 1),
        ({"RANK": "0", "LOCAL_RANK": "0"}, 1),
        ({"RANK": "1", "LOCAL_RANK": "1"}, 0),
        ({"RANK": "8", "LOCAL_RANK": "0"}, 1),
        (SLURM | {"SLURM_LOCALID": "1"}, 0),
        (SLURM | {"SLURM_LOCALID": "0"}, 1),
    ],
)
def test_what_every_rank_finds_in_the_configuration_is_told_by_the_first_of_each_machine(
    monkeypatch, capsys, variables, told
):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert entry.tell(ConfigError([Problem("stage.steps", 0, "at least 1")])) == 1
    assert capsys.readouterr().err.count("stage.steps=0") == told
