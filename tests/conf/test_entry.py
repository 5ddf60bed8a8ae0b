"""What a user reads: help, misspelt keys, every problem at once."""

import sys
from dataclasses import dataclass

import pytest
from hydra.core.global_hydra import GlobalHydra

from conf import entry
from train.__main__ import main
from train.config import RunConfig


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


def test_a_value_of_the_wrong_type_is_refused_with_its_key(run):
    result = run("stage.steps=many")
    assert result.returncode == 1
    assert "stage.steps" in result.stderr and "many" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_problem_is_named_at_once_with_key_value_and_fix(run, tmp_path):
    result = run(f"run_dir={tmp_path}/run", "parallel.dp_shard=3", "parallel.tp=2", "parallel.zero=7", "resume=maybe")
    assert result.returncode == 1
    for part in ("parallel.dp_shard=3", "parallel.tp=2", "parallel.zero=7", "resume=maybe"):
        assert part in result.stderr, part
    assert not (tmp_path / "run").exists(), "nothing may be written for a configuration that is refused"


def test_help_documents_every_key_with_its_default(run):
    result = run("--help")
    assert result.returncode == 0
    assert "clip: float = 1.0" in result.stdout and "largest global gradient norm" in result.stdout
    for option in ("objective=clm", "optim=muon", "schedule=cosine", "engine=native", "logger=jsonl"):
        assert f"-- {option}" in result.stdout, option


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "evaluate", "export", "verify"])
def test_the_composed_configuration_can_be_shown_for_every_stage(run, stage):
    result = run(f"stage={stage}", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "run_dir:" in result.stdout
