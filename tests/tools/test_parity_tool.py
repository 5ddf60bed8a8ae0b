"""The parity command: layouts in a word, what is refused, what a crash leaves, what it writes."""

import json
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import SCHEDULES, Layout
from tools.parity import BF16, FP32, MODEL, Cell, Row, Training, cells, compare, run
from tools.parity.__main__ import ParityConfig, figures, main
from tools.parity.layouts import WordError, parse, spell
from tools.parity.page import render
from tools.parity.run import failed
from train.objectives.dpo import DPO

SHORT = Training(model=replace(MODEL, layers=1), steps=2)


@pytest.mark.parametrize(
    ("word", "layout"),
    [
        ("alone", Layout()),
        ("tp2", Layout(tp=2)),
        ("dp2.zero3.mb2", Layout(dp_shard=2, zero=3, micro_batches=2)),
        ("dp_replicate2xdp_shard4xzero1", Layout(dp_replicate=2, dp_shard=4, zero=1)),
        ("cp2xep4xdp2", Layout(cp=2, ep=4, dp_shard=2)),
        ("pp2", Layout(pp=2, micro_batches=2)),
        ("pp2.dual_pipe_v", Layout(pp=2, schedule="dual_pipe_v", virtual_stages=2, micro_batches=4)),
        (
            "pp4.tp2.interleaved_1f1b.v3.mb8",
            Layout(pp=4, tp=2, schedule="interleaved_1f1b", virtual_stages=3, micro_batches=8),
        ),
        ("recompute_full.mb2", Layout(recompute="full", micro_batches=2)),
        ("recompute_0.5.tp2.ring", Layout(recompute="0.5", tp=2, ring=True)),
    ],
)
def test_a_word_stands_for_a_layout(word: str, layout: Layout) -> None:
    assert parse(word) == layout
    assert parse(spell(layout)) == layout


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("tq2", "'tq2' is not understood"),
        ("pp2.zbw", "'zbw' is not understood"),
        ("tp", "'tp' is not understood"),
        ("tp2..dp2", "'.dp2' is not understood"),
        ("tp2.", "'tp2' is not understood"),
        ("tp2.dp2xtp4", "tp is given twice"),
        ("dp2.dp_shard2", "dp_shard is given twice"),
    ],
)
def test_what_is_no_layout_is_told_by_the_part_that_is_wrong(word: str, told: str) -> None:
    with pytest.raises(WordError, match=told):
        parse(word)


counts = st.integers(1, 16)


@given(
    st.builds(
        Layout,
        *(counts for _ in range(6)),
        zero=st.integers(0, 3),
        schedule=st.sampled_from(SCHEDULES),
        virtual_stages=counts,
        micro_batches=counts,
        recompute=st.sampled_from(["none", "full", "selective", "0.25"]),
        ring=st.booleans(),
    )
)
def test_every_layout_can_be_spelt(layout: Layout) -> None:
    assert parse(spell(layout)) == layout


def test_everything_that_is_wrong_is_told_at_once() -> None:
    config = ParityConfig(
        layouts=["tq2", "dp2"], cells=["zero*", "nought"], engines=["natif"], precision="fp16", steps=1
    )
    assert {(p.key, p.found) for p in config.problems()} == {
        *(("layouts", "tq2"), ("cells", "nought")),
        *(("engines", "natif"), ("precision", "fp16"), ("steps", 1)),
    }
    assert ParityConfig().problems() == []


def test_a_layout_that_cannot_be_is_refused_by_its_word() -> None:
    told = {p.found: p.fix for p in ParityConfig(layouts=["dp3", "tp3", "dp2.zero7", "pp8"]).problems()}
    assert "multiple of 3" in told["dp3"]
    assert "parallel.tp=3" in told["tp3"]
    assert "parallel.zero=7" in told["dp2.zero7"]
    assert "parallel.pp=8" in told["pp8.mb8"]
    [problem] = ParityConfig(layouts=["dp8"], objective=DPO()).problems()
    assert "stage.global_batch=4" in problem.fix


def test_every_cell_of_the_matrix_can_run() -> None:
    assert len(cells()) >= 60
    assert ParityConfig(cells=["*"]).problems() == []


def test_without_layouts_and_cells_it_is_the_quick_cells() -> None:
    assert 10 <= len(ParityConfig().chosen()) <= 16
    assert [cell.name for cell in ParityConfig(layouts=["dp2", "dp_shard2", "mb2"]).chosen()] == ["dp2", "mb2"]
    assert [cell.name for cell in ParityConfig(layouts=["dp2"], cells=["zero1"]).chosen()] == ["dp2", "zero1"]


def test_what_is_given_replaces_what_a_cell_declares() -> None:
    objective, model = object(), replace(MODEL, layers=2)
    config = ParityConfig(cells=["muon-zero1"], objective=objective, model=model, precision="bf16", steps=3)
    [cell] = config.chosen()
    [named] = [cell for cell in cells() if cell.name == "muon-zero1"]
    assert cell.training == replace(named.training, objective=objective, model=model, precision="bf16", steps=3)
    assert (named.gate, cell.gate) == (FP32, BF16)


def test_the_names_of_the_matrix_are_different() -> None:
    names = [cell.name for cell in cells()]
    assert len(set(names)) == len(names)


def trouble() -> None:
    """One cell raises, one hangs, by their micro-batches."""
    build = run.build

    def troubled(layout: Layout, *arguments: Any, **named: Any) -> Any:
        if layout.micro_batches == 2:
            raise ValueError("out of order")
        if layout.micro_batches == 4:
            time.sleep(60)
        return build(layout, *arguments, **named)

    run.build = troubled


def test_a_cell_that_raises_or_hangs_is_red_with_its_reason_and_the_others_run() -> None:
    layouts = {"before": Layout(), "raises": parse("mb2"), "hangs": parse("mb4"), "after": Layout()}
    rows = compare([Cell(name, layout, SHORT) for name, layout in layouts.items()], trouble, timeout_s=5)
    before, raises, hangs, after = rows
    assert before.passed and after.passed
    assert not raises.passed and "rank 0 of 1 failed: ValueError('out of order')" in raises.reason
    assert not hangs.passed and "did not end in 5 s" in hangs.reason and "in troubled" in hangs.failure
    assert "RED raises" in str(raises) and "out of order" in str(raises)


def test_a_resumed_cell_whose_first_half_fails_is_red() -> None:
    [row] = compare([Cell("resumed", parse("mb2"), SHORT, resumed=Layout())], trouble)
    assert not row.passed and "out of order" in row.reason


def rows() -> list[Row]:
    """One of each kind: good, over the gate, failed."""
    good, over, none = (Cell(f"<{name}>", Layout(dp_shard=2), family="some") for name in ("good", "over", "none"))
    return [
        Row(good, 1e-6, 2e-6, 3e-6, steps=(0.0, 1e-6), seconds=1.0),
        Row(over, 2.5e-2, float("nan"), 0.0, steps=(1e-3, 2.5e-2)),
        failed(none, "rank 1 of 2 failed: <no reason>\nits output"),
    ]


class Texts(HTMLParser):
    """What a reader sees, and what the page would load."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.loaded = "", []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_cell_and_loads_nothing() -> None:
    page = Texts(render(rows(), steps=20))
    assert "2 of 3 cells are red" in page.text
    for told in ("<good>", "30% of its gate", "<over>", "2.5e-02", "rank 1 of 2 failed: <no reason>", "its output"):
        assert told in page.text, told
    assert page.loaded == []
    assert "All 1 cells" in Texts(render(rows()[:1], steps=20)).text


def test_the_figures_are_json() -> None:
    told = json.loads(json.dumps(figures(rows(), 20), allow_nan=False))
    assert not told["passed"]
    good, over, none = told["cells"]
    assert (good["loss"], good["margin"], good["layout"], good["ranks"]) == (1e-6, 0.3, "dp2", 2)
    assert (over["passed"], over["grad_norm"], none["loss"]) == (False, None, None)
    assert none["failure"].startswith("rank 1 of 2")


def test_the_command_prints_writes_and_tells_red_by_its_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = replace(MODEL, layers=1)
    files = {"json": str(tmp_path / "p.json"), "html": str(tmp_path / "p.html")}
    config = ParityConfig(layouts=["mb2", "dp2.zero1"], model=model, steps=2, **files)
    assert main(config, {}) == 0
    assert "2 of 2 cells agree" in capsys.readouterr().out
    assert [cell["layout"] for cell in json.loads((tmp_path / "p.json").read_text())["cells"]] == ["mb2", "dp2.zero1"]
    assert "dp2.zero1" in (tmp_path / "p.html").read_text()
    assert main(replace(config, layouts=["mb2"], model=replace(model, heads=3)), {}) == 1
    assert "one process: rank 0" in capsys.readouterr().out


def test_no_cells_lists_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ParityConfig(cells=[]), {}) == 0
    assert capsys.readouterr().out.split() == [cell.name for cell in cells()]
