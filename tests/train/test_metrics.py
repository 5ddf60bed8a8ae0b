"""Figures arrive once, in every sink, and no sink can stop a run."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest

from data_pipeline.artifact import Artifact, Draft
from train.metrics import console
from train.metrics.base import Metrics, Run
from train.metrics.console import Console
from train.metrics.jsonl import Jsonl, read
from train.metrics.tensorboard import TensorBoard
from train.metrics.wandb import mode, obstacle, server

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
    apart: bool = False

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


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("point", ["open", "log", "alert", "close"])
def test_a_dead_tracker_is_named_once_and_the_others_go_on(tmp_path, point, apart):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        metrics = Metrics({"dying": Dying(point, apart), "jsonl": Jsonl()}, run_in(tmp_path))
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 1.0})
            metrics.alert("stall", "no step")
        metrics.close({})
    assert [str(w.message) for w in seen if "dying" in str(w.message)] == [
        "logger dying failed and is left out from here on: ConnectionError('no server')"
    ]
    assert len(read(tmp_path / "metrics.jsonl")) == 3


@dataclass(frozen=True)
class Hanging:
    """A tracker that waits for ever, at a point or with every line, until the test lets it go."""

    point: str
    free: threading.Event = field(default_factory=threading.Event)
    seen: list = field(default_factory=list)
    apart = True

    def open(self, run):
        if self.point == "open":
            self.free.wait(60)
        return self

    def log(self, step, values):
        if self.point == "log":
            self.free.wait(60)
        self.seen.append(step)

    def alert(self, kind, text):
        self.seen.append(kind)

    def close(self, summary):
        if self.point == "close":
            self.free.wait(60)


@pytest.mark.parametrize("point", ["open", "log", "close"])
def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(tmp_path, monkeypatch, point):
    monkeypatch.setattr("train.metrics.base.OPEN_S", 0.2)
    hanging = Hanging(point)
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"hanging did not end within 0.2 s and is left behind"):
        metrics = Metrics({"hanging": hanging, "jsonl": Jsonl()}, run_in(tmp_path), close_s=0.2)
        for step in range(1, 101):
            metrics.log(step, {"loss": 1.0})
        metrics.close({"loss": 1.0})
    assert time.monotonic() - start < 5
    assert len(read(tmp_path / "metrics.jsonl")) == 100
    hanging.free.set()


def test_lines_that_a_tracker_is_too_slow_for_are_dropped_counted_and_said_once_but_no_alert(tmp_path, monkeypatch):
    monkeypatch.setattr("train.metrics.apart.CAPACITY", 4)
    hanging = Hanging("log")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        metrics = Metrics({"hanging": hanging}, run_in(tmp_path))
        metrics.log(1, {})
        while metrics._sinks["hanging"]._waiting:  # the first one is under way
            time.sleep(0.001)
        for step in range(2, 13):
            metrics.log(step, {})
        metrics.alert("stall", "no step")
        hanging.free.set()
        metrics.close({})
    assert hanging.seen == [1, 2, 3, 4, 5, "stall"]
    assert [str(w.message) for w in seen] == [
        "logger hanging does not keep up with the run: lines are left out",
        "logger hanging was too slow: 7 lines are missing there",
    ]


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


def test_several_at_once_hold_figures_alerts_and_the_machine(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics({"tensorboard": TensorBoard(), "jsonl": Jsonl(), "console": Console()}, run_in(tmp_path))
    metrics.log(3, {"loss": 2.0})
    metrics.system({"system/cpu": 0.5})
    metrics.alert("straggler", "rank 1 is slow")
    metrics.close({"loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("system/cpu")] == [(3, 0.5)]
    assert events.Tensors("alert/straggler/text_summary")[0].step == 3
    (line,) = read(tmp_path / "system.jsonl")
    assert line["step"] == 3 and line["system/cpu"] == 0.5
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [3], "figures of steps are by themselves"


def test_wandb_is_offline_without_a_key_and_online_with_one(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mode() == "offline"
    (tmp_path / ".netrc").write_text(f"machine {urlparse(server()).hostname} login user password p\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert mode() == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"


@contextmanager
def answering(code: int, body: bytes = b"{}", wait_s: float = 0.0):
    """A server that answers everything alike; yields its address and the requests' keys, paths and bodies."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("content-length") or 0)
            seen.append((self.headers.get("authorization"), self.path, self.rfile.read(length)))
            time.sleep(wait_s)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # who waited has gone
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


SECRET = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("code", "body", "why"),
    [
        (401, b"{}", "refuses the key of the environment variable WANDB_API_KEY"),
        (200, b'{"data": {"viewer": null}}', "refuses the key"),
        (200, b'{"data": {"viewer": {"id": "me"}}}', ""),
        (503, b"", "answers with HTTP 503"),
    ],
)
def test_a_wandb_key_is_tried_before_the_run_begins(monkeypatch, code, body, why):
    with answering(code, body) as (address, seen):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        told = obstacle(timeout_s=5)
    assert why in told if why else told == ""
    assert SECRET not in told and seen[0][1] == "/graphql"


def test_a_wandb_server_that_hangs_or_is_not_there_is_given_up_in_time(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with answering(200, wait_s=2) as (address, _):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        start = time.monotonic()
        assert "does not answer" in obstacle(timeout_s=0.2)
        assert time.monotonic() - start < 1.5
    assert "does not answer" in obstacle(timeout_s=5)


WANDB_RUN = """
import sys
from pathlib import Path
from data_pipeline.artifact import Artifact
from train.metrics.base import Metrics, Run
from train.metrics.wandb import WandB
root, step = Path(sys.argv[1]), int(sys.argv[2])
inputs = {"data": Artifact.read(root / "corpus")}
metrics = Metrics({"wandb": WandB()}, Run("a run", root, {"optim": {"lr": 0.1}}, 4, step, inputs))
metrics.log(step + 1, {"loss": 1.0, "tokens": 5})
metrics.system({"system/cpu": 0.5})
metrics.alert("spike", f"step {step + 1} was skipped")
metrics.artifact(Artifact.read(root / "made"))
metrics.close({"loss": 0.5})
"""


@pytest.fixture(scope="module")
def wandb_runs(tmp_path_factory):
    """A run and its restart, as two processes, with a server that refuses the key; what they printed, and where."""
    root = tmp_path_factory.mktemp("wandb")
    for name in ("corpus", "made"):
        (root / name).mkdir()
        (root / name / "file").write_text(name)
        Draft(root / name, name, {}, {}).publish("file")
    with answering(401) as (address, _):
        environment = {**os.environ, "WANDB_API_KEY": SECRET, "WANDB_BASE_URL": address, "HOME": str(root)}
        environment.pop("WANDB_MODE", None)
        ended = [
            subprocess.run(
                [sys.executable, "-c", WANDB_RUN, root, step],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            for step in ("0", "2")
        ]
    return root, [end.stderr for end in ended]


def records(root: Path) -> list[list]:
    """What each start of the run has recorded for `wandb sync`: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(root.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        data, place, whole, seen = file.read_bytes(), 7, b"", []
        while place + 7 <= len(data):
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if 2**15 - place % 2**15 < 7:  # no room for a header at a block's end
                place += 2**15 - place % 2**15
            if kind in (1, 4):  # a whole record, or the last part of one
                seen.append(Record.FromString(whole))
                whole = b""
        found.append(seen)
    return found


def test_a_refused_wandb_key_is_told_once_and_the_run_goes_on_offline(wandb_runs):
    root, told = wandb_runs
    for stderr in told:
        assert stderr.count("refuses the key of the environment variable WANDB_API_KEY") == 1
        assert f"wandb sync {root}/wandb/offline-run-*" in stderr
    assert len(records(root)) == 2


def test_wandb_keeps_its_run_over_a_restart(wandb_runs):
    root, _ = wandb_runs
    runs = [record.run for seen in records(root) for record in seen if record.HasField("run")]
    assert {run.run_id for run in runs} == {(root / "wandb_id").read_text()}
    config = {item.key: item.value_json for item in runs[0].config.update}
    assert json.loads(config["optim"]) == {"lr": 0.1}
    assert json.loads(config["inputs"]) == {"data": Artifact.read(root / "corpus").id}


def test_wandb_gets_figures_the_machine_alerts_and_the_line_of_artifacts(wandb_runs):
    root, _ = wandb_runs
    seen, _ = records(root)
    names = {item.nested_key[0] if item.nested_key else item.key for r in seen for item in r.history.item}
    assert {"train/loss", "train/tokens", "system/cpu", "step"} <= names
    assert [(r.alert.title, r.alert.text) for r in seen if r.HasField("alert")] == [("spike", "step 1 was skipped")]
    artifacts = {r.artifact.type: r.artifact for r in seen if r.HasField("artifact")}
    assert artifacts["corpus"].use_after_commit and not artifacts["made"].use_after_commit
    for kind in ("corpus", "made"):
        recorded = Artifact.read(root / kind)
        assert artifacts[kind].name == f"{kind}-{recorded.id}"
        assert json.loads(artifacts[kind].metadata)["id"] == recorded.id


def test_wandb_writes_no_secret(wandb_runs):
    root, told = wandb_runs
    files = [file for file in root.rglob("*") if file.is_file()]
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert SECRET not in "".join(told)
