"""What a run and a life leave on disk, searched for the secrets that their environment held."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.artifact import locked
from launchers import lifecycle, preflight
from launchers.graph import LifecycleConfig, StageSpec
from launchers.lifecycle import Life
from launchers.local import Local
from tests.train.runs import complete

CANARY = "cAnAry7Zq3Xk9Lw2"
ENVIRONMENT = {
    "WANDB_API_KEY": f"{CANARY}a",
    "HF_TOKEN": f"{CANARY}b",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}c",
    "MLFLOW_TRACKING_PASSWORD": f"{CANARY}d",
    "PACKAGE_INDEX": f"https://me:{CANARY}e@host/simple",
}
STAGES = Path(__file__).parents[1] / "launchers"
ROOT = STAGES.parents[1]


def holding(directory: Path) -> list[str]:
    """The files in which the canary is, or a part of it large enough to know it by."""
    return [
        str(file.relative_to(directory))
        for file in directory.rglob("*")
        if file.is_file() and CANARY[:12].encode() in file.read_bytes()
    ]


def test_the_search_finds_what_is_there(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\0" + CANARY.encode() + b"\0")
    assert holding(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "trackers", ["console,jsonl", pytest.param("console,jsonl,tensorboard,wandb,mlflow", marks=pytest.mark.slow)]
)
def test_a_run_writes_no_secret_whatever_follows_it(corpus, tmp_path, trackers):
    complete(
        corpus,
        tmp_path / "run",
        "stage.steps=2",
        f"logger=[{trackers}]",
        env={**ENVIRONMENT, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"},
        logs=tmp_path,
    )
    written = {file.name for file in tmp_path.rglob("*")}
    expected = {"config.yaml", "metrics.jsonl", "manifest.json", "attempts"}
    assert written >= expected | ({"wandb", "tensorboard", "mlflow.db"} if "wandb" in trackers else set())
    assert holding(tmp_path) == []


def test_a_life_whose_stages_print_the_environment_keeps_it_out_of_its_book_logs_and_console(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{STAGES}:{tmp_path}")
    monkeypatch.setattr(preflight, "check", lambda calls: {})
    monkeypatch.setattr(lifecycle, "code_fingerprint", lambda: "as it was")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tells.py").write_text("import os\nprint(dict(os.environ))\nraise SystemExit(os.environ['HF_TOKEN'])\n")
    stages = {"a": StageSpec(command="tells"), "b": StageSpec(command="dummy_stage")}
    root = tmp_path / "life"
    config = LifecycleConfig(name="life", root=str(root), stages=stages, launcher=Local(grace_s=1))
    with locked(root):
        life = Life(config)
        life.display.console = Console(file=io.StringIO(), width=200)
        assert life.run() == 1
    log = (root / "logs" / "a.log").read_text()
    assert "[HF_TOKEN]" in log and "'WANDB_API_KEY': '[WANDB_API_KEY]'" in log and "me:[PACKAGE_INDEX]@host" in log
    assert holding(root) == [] and CANARY not in life.display.console.file.getvalue()


@pytest.mark.parametrize(
    "setting", ["stages.verify.set.stage.api_key", "stages.pretrain.set.logger.wandb.key_of.hf_token"]
)
def test_a_life_given_a_secret_starts_nothing_and_does_not_tell_it(tmp_path, setting):
    command = [sys.executable, "-m", "launchers.lifecycle", "lifecycle=smoke", f"root={tmp_path}/life"]
    done = subprocess.run([*command, f"+{setting}={CANARY}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"{setting}=(a secret, not shown)" in done.stderr
    assert CANARY not in done.stdout + done.stderr and not (tmp_path / "life").exists()
