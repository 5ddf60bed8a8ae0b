"""One whole life on the real parts, killed in the middle: raw text to a verified export and its report."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from data_pipeline.artifact import Artifact
from tools.lineage import trace

pytestmark = pytest.mark.timeout(900)  # nine real stages; minutes where others use the cores too
STAGES = ["corpus", "tasks", "pretrain", "sft", "dpo", "evaluate", "export", "verify", "report"]


class Life:
    """The smoke lifecycle on a few files of the standard library."""

    def __init__(self, directory: Path):
        self.root = directory / "life"
        text = directory / "text"
        text.mkdir()
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
            (text / file.name).write_text(file.read_text(errors="replace")[:5000])
        self.settings = [f"root={self.root}", f"stages.corpus.set.corpus.paths=[{text}]"]

    def start(self, *settings: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "launchers.lifecycle", "lifecycle=smoke", *self.settings, *settings],
            env=dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="200"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *settings: str) -> tuple[str, dict[str, str]]:
        """What was shown, and the state of every stage in the last table."""
        process = self.start(*settings)
        shown, _ = process.communicate()
        assert process.returncode == 0, shown
        table = shown[shown.rindex("smoke after") :]
        return shown, {name: re.search(rf"^{name} +(\w+)", table, re.MULTILINE)[1] for name in STAGES}


@pytest.fixture(scope="module")
def life(tmp_path_factory) -> Life:
    return Life(tmp_path_factory.mktemp("smoke"))


def test_a_life_that_is_killed_goes_on_where_it_was_and_ends_with_a_report(life):
    process = life.start()
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "sft │ step" in line:
            process.kill()
    assert process.wait() == -9, "".join(seen)

    _, states = life.run()
    assert [states[name] for name in STAGES[:3]] == ["skipped"] * 3
    assert states["sft"] in ("resumed", "done") and [states[name] for name in STAGES[4:]] == ["done"] * 5
    steps = [json.loads(line) for line in (life.root / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "validation_loss" not in line] == [1, 2, 3, 4, 5, 6]

    page = (life.root / "report.html").read_text()
    for part in (
        "passed its gate and its export is verified",
        "loss, nats per pair",
        "even or odd?",
        "tools.chat target=",
    ):
        assert part in page, part
    line = trace(life.root / "verify")
    assert not [fault for node in line.walk() for fault in node.faults]
    assert {node.artifact.kind for node in line.walk()} == {
        "verification", "export", "evaluation", "dpo", "sft", "pretrain", "chat", "corpus",
    }  # fmt: skip


def test_a_finished_life_is_passed_over_without_starting_a_process(life):
    shown, states = life.run()
    assert states == dict.fromkeys(STAGES, "skipped")
    assert "python -m" not in shown


def test_a_changed_setting_redoes_only_what_depends_on_it(life):
    before = {name: Artifact.read(life.root / name).id for name in STAGES}
    _, states = life.run("stages.verify.set.stage.max_tokens=5")
    assert states == dict.fromkeys(STAGES, "skipped") | {"verify": "done", "report": "done"}
    after = {name: Artifact.read(life.root / name).id for name in STAGES}
    assert {name for name in STAGES if before[name] != after[name]} == {"verify", "report"}
    assert Artifact.read(life.root / f"verify.stale-{before['verify']}").config["max_tokens"] == 4
