"""The line of manifests: what it shows, and where it says that it is broken."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.artifact import MANIFEST, Draft
from tools.lineage import LineageConfig, main, trace

ROOT = Path(__file__).parent.parent.parent


def make(directory: Path, text: str, **inputs):
    directory.mkdir(exist_ok=True)
    (directory / "out.txt").write_text(text)
    return Draft(directory, directory.name, {"text": text}, inputs, metrics={"steps": 12}).publish("out.txt")


@pytest.fixture
def line(tmp_path):
    """corpus -> base -> export, and corpus -> export."""
    corpus = make(tmp_path / "corpus", "words")
    base = make(tmp_path / "base", "weights", data=corpus)
    make(tmp_path / "export", "files", model=base, tokenizer=corpus)
    return tmp_path


def test_a_whole_line_is_shown_to_its_source(line, capsys):
    assert main(LineageConfig(str(line / "export")), {}) == 0
    shown = capsys.readouterr().out
    assert shown.index("export") < shown.index("model:") < shown.index("data:") < shown.index("tokenizer:")
    assert shown.count("verified") == 3 and "see above" in shown and "steps 12" in shown


def test_an_input_made_anew_since_breaks_the_line(line, capsys):
    before = trace(line / "corpus").artifact.id
    after = make(line / "corpus", "other words").id
    assert main(LineageConfig(str(line / "export")), {}) == 1
    shown = capsys.readouterr().out
    assert shown.count(f"made anew since: {before} was used, {after} is there now") == 2, "on both ways to it"


def test_a_changed_file_is_found_by_its_checksum(line, capsys):
    (line / "base" / "out.txt").write_text("WEIGHTS")
    assert main(LineageConfig(str(line / "export"), verify=False), {}) == 0, "the size is the same"
    assert main(LineageConfig(str(line / "export")), {}) == 1
    assert "out.txt: checksum differs" in capsys.readouterr().out


def test_a_missing_file_and_a_missing_input_are_named(line, capsys):
    (line / "base" / "out.txt").unlink()
    (line / "corpus" / MANIFEST).unlink()
    assert main(LineageConfig(str(line / "export")), {}) == 1
    shown = capsys.readouterr().out
    assert "out.txt: missing" in shown and "is not a finished artifact" in shown


def test_a_directory_without_a_manifest_is_refused_with_a_message(tmp_path):
    command = [sys.executable, "-m", "tools.lineage", f"path={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "is not a finished artifact" in result.stderr
    assert "Traceback" not in result.stderr
