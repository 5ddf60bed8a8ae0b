"""The report: what it says of a whole life, of half a life, of a broken one; that it is one harmless file."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from data_pipeline.artifact import MANIFEST, Artifact
from tests.tools.fake_life import CHECKS, RESULTS, make, make_life
from tools.report import charts
from tools.report.__main__ import ReportConfig, main
from tools.report.page import render
from tools.report.read import read

STAGES = ["corpus", "tasks", "pretrain", "sft", "dpo", "evaluate", "export", "verify"]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("life") / "demo"
    make_life(root)
    return root


@pytest.fixture(scope="module")
def html(whole) -> str:
    """The page of a whole life, drawn once."""
    return render(read(whole), "demo")


@pytest.fixture
def life(whole, tmp_path, monkeypatch) -> Path:
    """A life to break, with its curves told instead of drawn: drawing takes seconds."""
    monkeypatch.setattr(charts, "lines", lambda title, curves, **_: Markup("<p>{}</p>").format(title) if curves else "")
    return shutil.copytree(whole, tmp_path / "demo")


def book(root: Path, *names: str, **failed: str) -> None:
    """What a lifecycle of these stages would have left."""
    stages = {name: {"command": f"python -m x {name}", "processes": 1, "inputs": []} for name in names}
    (root / "lifecycle.json").write_text(json.dumps({"stages": stages, "done": {}, "failed": failed}))


class Text(HTMLParser):
    """What a reader sees, section by section, and whether every element is closed in order."""

    VOID = {"meta", "br", "link", "path", "rect", "use", "img", "hr", "circle", "line"}

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.parts: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)


def page(root: Path) -> Text:
    return Text(render(read(root), root.name))


def test_the_page_shows_the_goodput_over_restarts(html):
    told = re.search(r"Goodput stage .*? Goodput: seconds", Text(html).text)
    assert told is not None
    for part in ("pretrain", "63.2%", "1 min 35 s", "useful steps", "restarts"):
        assert part in told[0], told[0]


def test_a_whole_life_is_told(whole, html):
    text = Text(html).text
    for part in (
        "The model passed its gate and its export is verified",
        "celery", "5.6.1", "BSD-3-Clause", "4 MB",
        "Of 1,000 documents 790 (79.0%) were kept. They make 2,456,900 tokens.",
        f"copies, personal data, samples: {whole}/corpus/corpus.html", "compare", "preferences train 400",
        "too short 150, symbols 50", "duplicate 10",
        "60 steps over 491,520 tokens on 2 processes. The training loss went from",
        "loss, nats per token", "loss, nats per pair", "reward margin of chosen over rejected", "learning rate",
        "Sort these digits: 3 1 2 pretrain ✗ wrong the class sft ✗ wrong 1 2 dpo ✓ right 1 2 3 expected 1 2 3",
        "83% held-out tasks solved 2% after pretrain, 81% after sft",
        "accuracy/sort 2.0% 81.0% 83.0%", "bits per byte 1.29 1.3 1.31", "bits_per_byte 1.31 at most 2 holds",
        "log-probabilities, fp32 3.1e-06 0.0001 holds",
        "5,123,456 parameters in 5 kB on disk",
        f"python -m tools.chat target={whole}/export", f"python -m tools.serve target={whole}/export",
        "9,000 30.0% 1.5 GB",
        "dpo 2 differences from sft",
    ):  # fmt: skip
        assert part in text, part


def test_the_page_is_one_file_that_loads_and_runs_nothing(html):
    links = Text(html).links
    assert all(link.startswith("#") for link in links), links
    assert "<script" not in html and "@import" not in html and "url(http" not in html and " on" + "load=" not in html


def test_colours_follow_the_page(html):
    assert "prefers-color-scheme: dark" in html
    svg = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}", svg), "a fixed colour would be unreadable in dark or in light"
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", html))
    assert used <= set(re.findall(r"--([a-z0-9-]+):", html))


def test_texts_from_a_run_are_escaped(life):
    attack = "<script>alert(1)</script>"
    make(
        life / "corpus", "corpus", {}, {"sources": [{"name": attack, "licence": attack, "url": "javascript:alert(1)"}]}
    )
    sample = {"task": attack, "prompt": attack, "expected": attack, "answers": {attack: attack}}
    results = RESULTS | {"models": {attack: {attack: 0.5}}, "samples": [sample]}
    (life / "evaluate" / "results.json").write_text(json.dumps(results))
    html = render(read(life), attack)
    assert "<script" not in html and "javascript:" not in html and html.count("&lt;script&gt;") >= 9


@pytest.mark.parametrize("gone", STAGES)
def test_a_missing_stage_does_not_hide_the_others(life, gone):
    shutil.rmtree(life / gone)
    assert f"{gone}/" not in page(life).text
    assert page(life).open == []


def test_an_empty_start_is_a_page_too(life):
    for name in ("pretrain", "sft", "dpo", "evaluate", "export", "verify", "corpus"):
        shutil.rmtree(life / name)
    text = page(life).text
    for part in ("No stage has been trained yet", "No model has been evaluated yet", "There are no weights yet"):
        assert part in text
    assert "This life is not finished" in text


def test_stages_that_the_lifecycle_has_yet_to_make_are_shown_as_missing(life):
    (life / "verify" / MANIFEST).unlink()
    book(life, "corpus", "pretrain", "verify", "ship", verify="it exited with code 3")
    text = page(life).text
    assert (
        "This life is not whole" in text and "verify: it exited with code 3" in text and "python -m x pretrain" in text
    )
    assert render(read(life), "demo").count('class="box missing"') == 2


def test_a_failed_gate_is_the_first_thing_said(life):
    check = {"metric": "bits_per_byte", "found": 3.0, "threshold": "at most 2", "passed": False}
    (life / "evaluate" / "results.json").write_text(
        json.dumps(RESULTS | {"gate": {"passed": False, "checks": [check]}})
    )
    text = page(life).text
    # The file is not the one of the manifest: that is said too.
    assert "The gate failed on bits_per_byte." in text and "bits_per_byte 3 at most 2 fails" in text


def test_a_failed_verification_shows_what_differs(life):
    (life / "verify" / MANIFEST).unlink()
    wrong = CHECKS[1] | {"found": 0.3, "passed": False}
    (life / "verify" / "verify.json").write_text(json.dumps({"passed": False, "checks": [CHECKS[0], wrong]}))
    book(life, *STAGES, verify="it exited with code 1")
    text = page(life).text
    assert "Is the export the same model? no" in text and "log-probabilities, fp32 0.3 0.0001 fails" in text


def test_an_input_made_anew_since_is_a_broken_line(life):
    assert 'class="edge broken"' not in render(read(life), "demo")
    make(life / "tasks", "chat", {}, files={"out": "other conversations"})
    assert render(read(life), "demo").count('class="edge broken"') == 3


def test_a_torn_metrics_file_and_values_that_are_not_finite_are_drawn_as_far_as_they_go(life, monkeypatch):
    monkeypatch.undo()
    with open(life / "pretrain" / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 61, "loss": NaN, "grad_norm": Infinity}\n{"step": 62, "lo')
    [pretrain] = [stage for stage in read(life) if stage.name == "pretrain"]
    loss = charts.lines("loss", [charts.Line("training", *pretrain.curve("loss"))])
    assert "at step 60" in loss and "nan" not in loss
    assert charts.lines("loss", [charts.Line("training", *pretrain.curve("never logged"))]) == ""


def test_long_curves_are_thinned_and_keep_their_ends():
    values = [float(i) for i in range(100_000)]
    thin = charts.thinned(values)
    assert len(thin) <= charts.MOST_POINTS and thin[-1] == values[-1] and thin == sorted(thin)
    assert charts.smoothed([1.0] * 50) == [1.0] * 50


def test_the_report_is_an_artifact_that_is_written_once(life, capsys):
    config = ReportConfig(runs=str(life), run_dir=str(life / "report"))
    assert main(config, {}) == 0
    first = Artifact.read(life / "report", kind="report")
    assert set(first.inputs) == set(STAGES)
    assert (life / "report.html").resolve() == (life / "report" / "report.html").resolve()
    assert main(config, {}) == 0 and "already" in capsys.readouterr().out
    (life / "report" / "report.html").unlink()
    assert main(config, {}) == 0 and (life / "report.html").exists()
    shutil.rmtree(life / "verify")
    assert main(config, {}) == 0
    assert Artifact.read(life / "report").id != first.id, "another life is another page"


def test_a_directory_without_stages_is_refused_with_a_message(tmp_path):
    command = [sys.executable, "-m", "tools.report", f"runs={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "holds no stage" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "report").exists()
