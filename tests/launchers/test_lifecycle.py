"""A life of stages that cost nothing: what is run, what is passed over, what happens when something is cut."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.artifact import Artifact, LiveRunError, locked
from launchers import lifecycle, preflight
from launchers.graph import LifecycleConfig, StageSpec
from launchers.lifecycle import Life, StagesError, main
from launchers.local import Local

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def dummy(**others) -> StageSpec:
    return StageSpec(command="dummy_stage", **others)


def chain() -> dict[str, StageSpec]:
    """a -> b -> d, c on its own."""
    return {
        "a": dummy(set={"value": 1}),
        "b": dummy(needs={"source": "a"}),
        "c": dummy(),
        "d": dummy(needs={"sources": ["b"]}),
    }


@pytest.fixture
def live(tmp_path, monkeypatch):
    """Run stages in a directory; returns exit code, states and what was shown."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{HERE}")
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(preflight, "check", lambda calls: {})
    monkeypatch.setattr(lifecycle, "code_fingerprint", lambda: "as it was")

    def run(stages: dict[str, StageSpec], **options):
        root = tmp_path / "life"
        config = LifecycleConfig(name="life", root=str(root), stages=stages, launcher=Local(grace_s=1), **options)
        assert config.problems() == []
        with locked(root):
            life = Life(config)
            life.display.console = Console(file=io.StringIO(), width=200)
            code = life.run()
        return code, {name: row.state for name, row in life.rows.items()}, life.display.console.file.getvalue()

    run.root = tmp_path / "life"
    return run


def test_a_second_run_starts_nothing(live):
    assert live(chain())[:2] == (0, dict.fromkeys("abcd", "done"))
    written = {name: (live.root / name / "manifest.json").read_bytes() for name in "abcd"}
    code, states, shown = live(chain())
    assert (code, states) == (0, dict.fromkeys("abcd", "skipped"))
    assert "python -m" not in shown
    assert written == {name: (live.root / name / "manifest.json").read_bytes() for name in "abcd"}


def test_what_cannot_be_proven_is_left_to_the_stage_to_judge(live, monkeypatch):
    live(chain())
    monkeypatch.setattr(lifecycle, "code_fingerprint", lambda: "changed since")
    code, states, shown = live(chain())
    assert (code, states) == (0, dict.fromkeys("abcd", "skipped"))
    assert shown.count("python -m dummy_stage") == 4


def test_a_changed_setting_redoes_the_stage_and_what_depends_on_it(live):
    live(chain())
    before = Artifact.read(live.root / "b").id
    (live.root / "b.stale-earlier").mkdir()
    changed = chain() | {"b": dummy(needs={"source": "a"}, set={"value": 7})}
    code, states, shown = live(changed)
    assert (code, states) == (0, {"a": "skipped", "b": "done", "c": "skipped", "d": "done"})
    aside = live.root / f"b.stale-{before}"
    assert Artifact.read(aside).config["value"] == 0 and str(aside) in shown
    assert list(live.root.glob("b.stale-*")) == [aside], "one earlier artifact is kept, not every one"


def test_a_stage_is_asked_again_when_a_file_that_its_settings_name_has_changed(live, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.md").write_text("one")
    stages = {"a": dummy(set={"text": str(tmp_path / "notes")}), "b": dummy(needs={"source": "a"})}
    live(stages)
    assert "a: python -m" not in live(stages)[2], "nothing has changed"
    (tmp_path / "notes" / "two.md").write_text("two")
    shown = live(stages)[2]
    assert "a: python -m" in shown and "b: python -m" not in shown


def test_a_setting_that_changes_no_result_redoes_nothing_else(live):
    live(chain())
    code, states, _ = live(chain() | {"b": dummy(needs={"source": "a"}, set={"seconds": 0.01})})
    assert (code, states) == (0, dict.fromkeys("abcd", "skipped"))


def test_a_damaged_artifact_is_made_anew(live):
    live(chain())
    (live.root / "b" / "out.txt").write_text("cut short by a full disk")
    code, states, shown = live(chain())
    assert code == 0 and states["b"] == "done" and "out.txt: 24 bytes instead of 1" in shown
    assert states["d"] == "skipped", "the same bytes came out, so what depends on them stands"


def test_a_failure_names_the_stage_and_its_last_lines_and_starts_no_dependant(live):
    stages = chain() | {"b": dummy(needs={"source": "a"}, set={"behaviour": "fails"})}
    code, states, shown = live(stages)
    assert (code, states) == (1, {"a": "done", "b": "failed", "c": "not started", "d": "not started"})
    assert "stage b failed" in shown and "something the user can mend" in shown.split("The last lines of")[1]
    assert "something the user can mend" in (live.root / "logs" / "b.log").read_text()
    assert live(chain())[:2] == (0, {"a": "skipped", "b": "resumed", "c": "done", "d": "done"})


def test_a_stage_that_is_always_run_is_run_after_a_failure(live):
    stages = {
        "a": dummy(set={"behaviour": "fails"}),
        "b": dummy(needs={"source": "a"}),
        "page": dummy(after=["b"], always=True),
    }
    assert live(stages)[:2] == (1, {"a": "failed", "b": "not started", "page": "done"})


def test_success_without_an_artifact_is_a_failure(live):
    code, states, shown = live({"a": dummy(set={"behaviour": "leaves nothing"})})
    assert (code, states) == (1, {"a": "failed"}) and "it exited with 0, but" in shown


def test_a_stage_that_stopped_early_is_started_again(live):
    code, states, _ = live({"a": dummy(set={"behaviour": "early"})})
    assert (code, states) == (0, {"a": "resumed"})
    assert (live.root / "a" / "starts").read_text() == "3"


def test_restarts_are_bounded(live):
    code, states, shown = live({"a": dummy(set={"behaviour": "always early"})}, restarts=2)
    assert (code, states) == (1, {"a": "failed"}) and "stopped early 3 times" in shown
    assert (live.root / "a" / "starts").read_text() == "3"


def test_a_stage_that_lost_a_rank_is_started_again_while_that_brings_it_forward(live):
    code, states, shown = live({"a": dummy(set={"behaviour": "loses a rank"})}, restarts=1)
    assert (code, states) == (0, {"a": "resumed"}) and "a was lost: it exited with code 76; start 3" in shown


def test_a_stage_that_loses_ranks_in_vain_is_given_up(live):
    code, states, shown = live({"a": dummy(set={"behaviour": "always loses a rank"})}, restarts=1)
    assert (code, states) == (1, {"a": "failed"})
    assert (
        "killed by SIGKILL; is there enough memory? (2 times without a new checkpoint in between; see restarts)"
        in shown
    )


def test_independent_stages_run_side_by_side_when_asked(live):
    stages = {
        "a": dummy(set={"seconds": 1.0}),
        "b": dummy(set={"seconds": 1.0}),
        "c": dummy(needs={"sources": ["a", "b"]}),
    }
    assert live(stages, concurrent=2)[:2] == (0, dict.fromkeys("abc", "done"))
    a, b, c = (Artifact.read(live.root / name) for name in "abc")
    assert max(a.started_s, b.started_s) < min(a.started_s + a.duration_s, b.started_s + b.duration_s) < c.started_s


def test_logs_hold_every_rank_and_the_command(live):
    live({"a": dummy(processes=2, set={"text": "it's"})})
    log = (live.root / "logs" / "a.log").read_text()
    assert (
        "python -m dummy_stage" in log and "rank 0 of 2 with value 0 and text it's" in log and "[1] rank 1 of 2" in log
    )


def test_a_second_lifecycle_in_the_same_directory_is_refused(live, tmp_path):
    live.root.mkdir()
    with locked(live.root), pytest.raises(LiveRunError, match="is being written by process"):
        main(LifecycleConfig(name="life", root=str(live.root), stages=chain(), launcher=Local()), {})


def test_every_wrong_stage_is_told_before_the_first_one_starts(live, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{HERE}")
    stages = {
        "a": dummy(set={"value": -4}),
        "b": dummy(needs={"source": "a"}, set={"valu": 3}),
        "c": dummy(set={"value": "many"}),
        "d": dummy(),
    }
    config = LifecycleConfig(name="life", root=str(tmp_path), stages=stages, launcher=Local())
    with pytest.raises(StagesError) as error:
        Life(config).plan()
    told = str(error.value)
    assert "stage a:\n  value=-4: 0 or more" in told
    assert "stage b:\n  Could not override 'valu'" in told and "Did you mean value?" in told
    assert "stage c:" in told and "many" in told
    assert "stage d" not in told
    assert not (tmp_path / "a").exists()


# Signals, to a lifecycle in a process of its own.


@pytest.fixture
def command(tmp_path):
    """Start `python -m launchers.lifecycle` on a -> b, where b works as told; wait until it does."""
    started = []

    def start(**values) -> subprocess.Popen:
        (tmp_path / "lifecycle").mkdir(exist_ok=True)
        stages = {
            "a": {"command": "dummy_stage"},
            "b": {"command": "dummy_stage", "needs": {"source": "a"}, "set": values},
        }
        content = {"name": "life", "root": str(tmp_path / "life"), "stages": stages}
        (tmp_path / "lifecycle" / "life.yaml").write_text("# @package _global_\n" + json.dumps(content))
        process = subprocess.Popen(
            [sys.executable, "-m", "launchers.lifecycle", "--config-dir", str(tmp_path), "lifecycle=life"],
            env=dict(os.environ, PYTHONPATH=f"{ROOT}:{HERE}", PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        for line in process.stdout:
            if "b │ working" in line:
                return process
        raise AssertionError(f"the lifecycle ended with {process.wait()} before b was at work")

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_request_to_stop_is_passed_on_and_ends_with_75(command, tmp_path):
    process = command(behaviour="stops on request", seconds=60)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "The same command goes on from here" in shown
    assert not (tmp_path / "life" / "b" / "manifest.json").exists()


def test_a_second_request_kills(command):
    process = command(behaviour="ignores requests", seconds=60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_killed_lifecycle_leaves_no_stage_behind_and_is_gone_on_with(command, tmp_path):
    process = command(seconds=5)
    process.kill()
    process.wait()
    shown, _ = (again := command()).communicate(timeout=20)
    assert again.returncode == 0 and re.search(r"a +skipped", shown) and re.search(r"b +resumed", shown)
    assert Artifact.read(tmp_path / "life" / "b").kind == "dummy"
