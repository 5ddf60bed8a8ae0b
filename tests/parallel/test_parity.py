"""Every layout trains the same run. That the comparison notices when one does not: test_mutations.py."""

from dataclasses import replace

import pytest
import torch

from parallel.layout import Layout
from tools.parity import MODEL, QUICK, Cell, Gate, Row, Training, Trajectory, cells, compare, difference
from tools.parity.cells import TABLE

BREAKABLE = Cell("breakable", Layout(dp_shard=2, micro_batches=2))


def quick(cell: Cell) -> Cell:
    """Fewer steps of as small a model as has a layer for each stage."""
    stages = max(layout.pp * layout.virtual_stages for layout in (cell.layout, cell.resumed) if layout is not None)
    model = replace(cell.training.model, layers=max(2, stages))
    return replace(cell, training=replace(cell.training, model=model, steps=4))


def red(rows: list[Row]) -> str:
    return "\n".join(str(row) for row in rows if not row.passed)


def test_the_quick_cells_agree_with_one_process() -> None:
    chosen = [quick(cell) for cell in cells() if cell.name in QUICK]
    assert len(chosen) == len(QUICK)
    assert red(compare(chosen)) == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", TABLE)
def test_every_cell_agrees_with_one_process_over_20_steps(family: str) -> None:
    chosen = [cell for cell in cells() if cell.family == family]
    assert {cell.training.steps for cell in chosen} == {20}
    assert red(compare(chosen, timeout_s=200)) == ""


def test_a_nan_is_red() -> None:
    expected = Trajectory([1.0], [1.0], {"w": torch.ones(2)})
    for found in (
        Trajectory([float("nan")], [1.0], {"w": torch.ones(2)}),
        Trajectory([1.0], [float("nan")], {"w": torch.ones(2)}),
        Trajectory([1.0], [1.0], {"w": torch.tensor([1.0, float("nan")])}),
    ):
        assert not difference(BREAKABLE, found, expected).passed
    assert difference(BREAKABLE, expected, expected) == Row(BREAKABLE, 0.0, 0.0, 0.0, steps=(0.0,))


def test_a_row_is_red_when_any_figure_is_over_its_gate() -> None:
    gate = Gate(loss=1.0, grad_norm=2.0, weights=3.0)
    cell = replace(BREAKABLE, gate=gate, training=Training(model=MODEL))
    assert Row(cell, 1.0, 2.0, 3.0).passed
    assert not any(Row(cell, *figures).passed for figures in [(1.1, 0, 0), (0, 2.1, 0), (0, 0, 3.1)])
