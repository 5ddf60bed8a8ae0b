"""People hear of what goes wrong: stalls, alerts by command and webhook, the machine, MLflow; and of no secret."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.artifact import Artifact, Draft
from tests.train.runs import begin, complete, until
from tests.train.test_metrics import answering, run_in
from tests.train.test_resume import assert_same_run, losses
from train.metrics.alert import Alert
from train.metrics.base import Metrics, Run
from train.metrics.jsonl import read
from train.metrics.mlflow import MLflow
from train.metrics.system import Machine
from train.throughput import Clock
from train.watching import Watcher, Watching

SECRET = "s3cr3t-path-of-a-webhook"


class Told:
    """Metrics that remember what they were told."""

    def __init__(self):
        self.alerts, self.looks = [], []

    def alert(self, kind, text):
        self.alerts.append((kind, text))

    def system(self, values):
        self.looks.append(values)


@pytest.fixture
def loop(monkeypatch):
    """A clock that steps of a second were trained by, its hand, and a watcher of it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock, told = Clock(torch.device("cpu")), Told()
    clock.turn("compute")
    watcher = Watcher(Watching(stall_times=10, stall_least_s=5), clock, told, Path("."), torch.device("cpu"))

    def trained(steps):
        for number in range(steps, steps + 4):
            with clock.step(number):
                now[0] += 1
            watcher.look_for_stall()

    trained(0)
    return now, clock, told, watcher, trained


def test_a_step_that_takes_ten_times_the_usual_one_is_told_once_and_so_is_the_next_such(loop):
    now, _, told, watcher, trained = loop
    for _ in range(3):
        now[0] += 4.9
        watcher.look_for_stall()
        assert len(told.alerts) == (now[0] > 4 + 10)
    watcher.look_for_stall()
    ((kind, text),) = told.alerts
    assert kind == "stall" and "after step 4" in text and "usual one takes 1 s" in text and "in compute" in text
    trained(4)
    now[0] += 100
    watcher.look_for_stall()
    assert len(told.alerts) == 2


def test_a_validation_is_no_stall_but_a_save_that_never_ends_is(loop):
    now, clock, told, watcher, _ = loop
    with clock.on("evaluation"):
        now[0] += 1000
        watcher.look_for_stall()
    assert told.alerts == []
    with clock.on("checkpoint"):
        now[0] += 1000
        watcher.look_for_stall()
    assert "in checkpoint" in told.alerts[0][1]


def test_before_there_is_a_usual_step_nothing_is_a_stall(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock, told = Clock(torch.device("cpu")), Told()
    clock.turn("compute")
    watcher = Watcher(Watching(), clock, told, Path("."), torch.device("cpu"))
    with clock.step(0):
        now[0] += 3600  # compiles
        watcher.look_for_stall()
    watcher.look_for_stall()
    assert told.alerts == []


def test_the_machine_is_looked_at_every_so_often(tmp_path):
    told = Told()
    with Watcher(Watching(system_every_s=0.05), Clock(torch.device("cpu")), told, tmp_path, torch.device("cpu")):
        deadline = time.monotonic() + 30
        while len(told.looks) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    figures = told.looks[2]
    assert all(name.startswith("system/") for name in figures)
    for share in ("cpu", "memory", "disk"):
        assert 0 <= figures[f"system/{share}"] <= 1
    assert figures["system/process_memory_bytes"] > 2**20 and figures["system/disk_free_bytes"] > 0


def test_a_machine_that_hides_its_figures_is_told_once_and_stops_nothing(tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise PermissionError("/proc is not for you")

    monkeypatch.setattr(Machine, "look", refuse)
    with Watcher(Watching(system_every_s=0.02), Clock(torch.device("cpu")), Told(), tmp_path, torch.device("cpu")):
        time.sleep(0.3)
    assert capsys.readouterr().err.count("figures of the machine are left out") == 1


def test_an_alert_runs_the_command_and_posts_to_the_webhook(tmp_path, monkeypatch):
    file = tmp_path / "told"
    command = f"{sys.executable} -c 'import sys; open(sys.argv[1], \"a\").write(repr(sys.argv[2:]))' {file}"
    with answering(200) as (address, seen):
        monkeypatch.setenv("LONGRUN_WEBHOOK", f"{address}/{SECRET}")
        metrics = Metrics({"alert": Alert(command=command)}, run_in(tmp_path))
        metrics.alert("spike", "step 5 was skipped; $(touch x)")
        metrics.alert("spike", "step 6 was skipped")
        metrics.alert("gate", "it did not pass")
        metrics.close({})
    assert file.read_text().count("step 5 was skipped; $(touch x)") == 1 and "step 6" not in file.read_text()
    posted = [json.loads(body) for _, _, body in seen]
    assert [(one["kind"], one["run"]) for one in posted] == [("spike", "a run"), ("gate", "a run")]
    assert "it did not pass" in posted[1]["text"] and seen[0][1] == f"/{SECRET}"


@pytest.mark.parametrize(
    ("code", "wait_s", "why"), [(500, 0, "HTTP 500"), (200, 3, "Timeout"), (None, 0, "Connection")]
)
def test_a_webhook_that_fails_or_hangs_is_named_without_its_address_and_tried_again(
    tmp_path, monkeypatch, capfd, code, wait_s, why
):
    with answering(code or 200, wait_s=wait_s) as (address, _):
        monkeypatch.setenv("LONGRUN_WEBHOOK", f"{address if code else 'http://127.0.0.1:9'}/{SECRET}")
        sink = Alert(timeout_s=0.2, every_s=0).open(run_in(tmp_path))
        sink.alert("stall", "no step")
        sink.alert("stall", "no step")
    told = capfd.readouterr().err
    assert told.count("an alert was not delivered") == 2 and why in told and SECRET not in told


def test_a_command_that_fails_or_hangs_is_named(tmp_path, capfd):
    ways = {"false": "exit code 1", "sh -c 'sleep 5 | cat'": "took more than 0.2 s", "/no/such": "No such file"}
    for command, why in ways.items():
        Alert(command=command, timeout_s=0.2).open(run_in(tmp_path)).alert("fault", "a bit flipped")
        assert why in capfd.readouterr().err


def test_alerts_without_anybody_to_tell_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.delenv("LONGRUN_WEBHOOK", raising=False)
    with pytest.warns(UserWarning, match=r"logger alert failed .*set logger.alert.command, or .* LONGRUN_WEBHOOK"):
        Metrics({"alert": Alert()}, run_in(tmp_path)).close({})


def test_alerts_between_two_of_a_kind_are_counted(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said = []
    sink = Alert(command="true", every_s=60).open(run_in(tmp_path))
    sink._call = lambda kind, text: said.append(text)
    for now[0] in (0, 1, 2, 61):
        sink.alert("spike", "again")
    assert len(said) == 2 and "2 more of this kind" in said[1]


def tracked(directory: Path, resumed_step: int, artifact: Artifact) -> None:
    run = Run("a run", directory, {"optim": {"lr": 0.1, "betas": [0.9, 0.95]}}, 4, resumed_step, {"data": artifact})
    metrics = Metrics({"mlflow": MLflow()}, run, close_s=120)
    for step in range(resumed_step + 1, resumed_step + 3):
        metrics.log(step, {"loss": 1.0 / step, "note": "a text"})
    metrics.log(resumed_step + 2, {"validation_loss": 0.5})
    metrics.system({"system/cpu": 0.5})
    metrics.alert("spike", "step 1 was skipped")
    if resumed_step:
        metrics.artifact(artifact)
    metrics.close({"loss": 0.25, "steps": 4} if resumed_step else {})


@pytest.mark.slow
@pytest.mark.parametrize("store", ["beside the runs", "by MLFLOW_TRACKING_URI"])
def test_mlflow_holds_one_run_over_a_restart(tmp_path, monkeypatch, store):
    from mlflow.tracking.client import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    if store != "beside the runs":
        uri = (tmp_path / "mlruns").as_uri()
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "file").write_text("made")
    artifact = Draft(run_dir, "pretrain", {}, {}).publish("file")
    for resumed_step in (0, 2):
        tracked(run_dir, resumed_step, artifact)
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("longrun").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_id == (run_dir / "mlflow_id").read_text()
    assert run.data.params == {"optim.lr": "0.1", "optim.betas": "[0.9, 0.95]"}
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
    assert run.data.metrics["validation/loss"] == 0.5 and run.data.metrics["summary/loss"] == 0.25
    assert run.data.metrics["system/cpu"] == 0.5
    tags = run.data.tags
    assert (tags["artifact"], tags["input.data"], tags["alert.spike"]) == (artifact.id,) * 2 + ("step 1 was skipped",)
    if store == "beside the runs":
        assert list((tmp_path / "mlflow_artifacts").rglob("manifest.json"))


ALL = "logger=[jsonl,tensorboard,wandb,mlflow,alert]"


@pytest.mark.slow
def test_a_run_that_all_watch_is_the_run_that_nobody_watches(corpus, tmp_path):
    """Killed and started again, with a W&B server that hangs and a command that fails."""
    settings = ("stage.steps=40", "stage.checkpoint_every=10", "model.hidden=128")
    complete(corpus, tmp_path / "alone", *settings)
    watched = (*settings, ALL, "logger.alert.command=false", "logger.wandb.timeout_s=1", "watching.system_every_s=0.2")
    with answering(200, wait_s=30) as (address, _):
        environment = {
            "WANDB_BASE_URL": address, "WANDB_API_KEY": "k" * 40, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
        }  # fmt: skip
        running = begin(corpus, tmp_path / "run", *watched, env=environment)
        until(lambda: len(losses(tmp_path / "run")) >= 15, running, timeout_s=200)
        running.kill()
        said = complete(corpus, tmp_path / "run", *watched, env=environment)
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    assert said.count("does not answer") == 1 and "The run is recorded offline" in said
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    assert any("system/cpu" in line for line in read(tmp_path / "run" / "system.jsonl"))
    assert os.listdir(tmp_path / "run" / "tensorboard")
