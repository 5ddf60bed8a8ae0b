"""Figures arrive once, in every sink, and no sink can stop a run."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import pytest
import wandb

from train.metrics import console
from train.metrics.base import Metrics, Run
from train.metrics.console import Console
from train.metrics.jsonl import Jsonl, read
from train.metrics.tensorboard import TensorBoard
from train.metrics.wandb import mode

TRAINING = {"loss": 2.5, "lr": 3e-4, "grad_norm": 0.7, "tokens_per_s": 12345.0, "mfu": 0.421, "memory_bytes": 2**30}


def run_in(directory: Path, resumed_step: int = 0) -> Run:
    return Run("a run", directory, {"optim": {"lr": 0.1}}, steps=10, resumed_step=resumed_step)


def test_jsonl_has_each_step_once_after_a_resume(tmp_path):
    first = Jsonl().open(run_in(tmp_path))
    for step in range(1, 7):
        first.log(step, {"loss": float(step)})
        if step % 2 == 0:
            first.log(step, {"validation_loss": float(step)})
    first.close({})
    second = Jsonl().open(run_in(tmp_path, resumed_step=4))  # saved after step 4, before its validation
    second.log(4, {"validation_loss": 40.0})
    second.log(5, {"loss": 50.0})
    second.close({})
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines if "loss" in line] == [1, 2, 3, 4, 50]
    assert [line["validation_loss"] for line in lines if "validation_loss" in line] == [2, 40]


def test_jsonl_survives_a_line_torn_by_a_kill_and_begins_anew_with_a_new_run(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    Jsonl().open(run_in(tmp_path, resumed_step=2)).close({})
    assert read(file) == [{"step": 1, "loss": 1.0}]
    Jsonl().open(run_in(tmp_path)).close({})
    assert file.read_text() == ""


def test_jsonl_stays_json_when_a_figure_is_not_finite(tmp_path):
    sink = Jsonl().open(run_in(tmp_path))
    sink.log(1, {"loss": float("nan"), "grad_norm": float("inf")})

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)["loss"] is None


def test_an_alert_is_kept_and_shown_though_its_step_is_trained_again(tmp_path, capsys):
    for resumed_step in (0, 4):
        metrics = Metrics(
            {"jsonl": Jsonl(), "console": Console(), "tensorboard": TensorBoard()}, run_in(tmp_path, resumed_step)
        )
        metrics.alert("spike", f"step {resumed_step + 5} was skipped")
        metrics.close({})
    lines = read(tmp_path / "alerts.jsonl")
    assert [(line["kind"], line["text"]) for line in lines] == [
        ("spike", "step 5 was skipped"),
        ("spike", "step 9 was skipped"),
    ]
    assert "ALERT spike: step 5 was skipped" in capsys.readouterr().out


@dataclass(frozen=True)
class Dying:
    """A tracker that fails at a point."""

    point: str

    def open(self, run):
        if self.point == "open":
            raise ConnectionError("no server")
        return self

    def log(self, step, values):
        if self.point == "log":
            raise ConnectionError("no server")

    def close(self, summary):
        if self.point == "close":
            raise ConnectionError("no server")

    def alert(self, kind, text):
        if self.point == "alert":
            raise ConnectionError("no server")


@pytest.mark.parametrize("point", ["open", "log", "alert", "close"])
def test_a_dead_tracker_is_named_once_and_the_others_go_on(tmp_path, point):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        metrics = Metrics({"dying": Dying(point), "jsonl": Jsonl()}, run_in(tmp_path))
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 1.0})
            metrics.alert("stall", "no step")
        metrics.close({})
    assert [str(w.message) for w in seen if "dying" in str(w.message)] == [
        "logger dying failed and is left out from here on: ConnectionError('no server')"
    ]
    assert len(read(tmp_path / "metrics.jsonl")) == 3


def test_plain_lines_show_every_figure_with_its_unit(tmp_path, capsys):
    sink = Console(every_s=0).open(run_in(tmp_path))
    sink.log(1, {**TRAINING, "eta_s": 3725.0})
    sink.log(1, {"validation_loss": 2.25, "bits_per_byte": 1.5})
    shown, validation = capsys.readouterr().out.splitlines()
    for part in (
        "step 1/10",
        "loss 2.5000",
        "lr 3.00e-04",
        "norm 0.7",
        "12.3k tok/s",
        "MFU 42.1%",
        "1.00 GiB",
        "1:02:05",
    ):
        assert part in shown
    assert "validation_loss 2.2500" in validation and "bits_per_byte 1.5000" in validation


def test_plain_lines_do_not_flood_a_log_file(tmp_path, capsys):
    sink = Console(every_s=60).open(run_in(tmp_path))
    for step in range(1, 11):
        sink.log(step, TRAINING)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/10", "10/10"]


def test_a_terminal_gets_one_live_line(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    sink = Console().open(run_in(tmp_path))
    assert isinstance(sink, console._Live)
    for step in range(1, 11):
        sink.log(step, TRAINING)
    sink.log(10, {"validation_loss": 2.25})
    sink.close({})
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert shown != terminal.getvalue(), "no control codes: nothing moves"
    assert "10/10" in shown and "MFU 42.1%" in shown and "validation_loss 2.2500" in shown


def test_tensorboard_holds_the_scalars_and_hides_steps_that_are_trained_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_step, loss in ((0, 1.0), (2, 9.0)):
        sink = TensorBoard().open(run_in(tmp_path, resumed_step))
        for step in range(resumed_step + 1, 5):
            sink.log(step, {"loss": loss})
        sink.log(4, {"validation_loss": 7.0})
        sink.close({})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 9), (4, 9)]
    assert events.Scalars("validation/loss")[-1].value == 7


def test_wandb_is_offline_without_a_key_and_online_with_one(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mode() == "offline"
    (tmp_path / ".netrc").write_text(f"machine {urlparse(wandb.Settings().base_url).hostname} login user password p\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert mode() == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"


WANDB_RUN = """
import sys
from pathlib import Path
from urllib.parse import urlparse
from train.metrics.base import Run
from train.metrics.wandb import WandB
run = Run("a run", Path(sys.argv[1]), {"optim": {"lr": 0.1}}, steps=4, resumed_step=int(sys.argv[2]))
sink = WandB().open(run)
print(sink._run.id, sink._run.settings.mode, dict(sink._run.config))
sink.log(int(sys.argv[2]) + 1, {"loss": 1.0, "tokens": 5})
sink.close({"loss": 0.5})
"""


def test_wandb_keeps_its_run_over_a_restart_and_writes_no_secret(tmp_path):
    """Two processes, as a restart is one; the key in the environment is never written."""
    secret = "0123456789abcdef" * 2 + "01234567"
    environment = {**os.environ, "WANDB_API_KEY": secret, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", WANDB_RUN, tmp_path, step],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for step in ("0", "2")
    )
    assert first == second
    assert first.split()[0] == (tmp_path / "wandb_id").read_text() and "'lr': 0.1" in first
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("run-" in str(file) for file in files)
    assert not [file for file in files if secret.encode() in file.read_bytes()]
