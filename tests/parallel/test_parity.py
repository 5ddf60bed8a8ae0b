"""Every layout trains the same run, and the comparison notices when one does not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import LossTerms
from parallel.layout import Layout
from parallel.place import Placement
from parallel.reduce import Sums
from tools.parity import FP32, MODEL, QUICK, Cell, Gate, Row, Training, Trajectory, cells, compare, difference
from train.objectives.clm import CausalLM

BREAKABLE = Cell("breakable", Layout(dp_shard=2, micro_batches=2))


def quick(cell: Cell) -> Cell:
    """Fewer steps of a smaller model."""
    model = replace(cell.training.model, layers=2)
    return replace(cell, training=replace(cell.training, model=model, steps=4))


def red(rows: list[Row]) -> str:
    return "\n".join(str(row) for row in rows if not row.passed)


def test_the_quick_cells_agree_with_one_process() -> None:
    chosen = [quick(cell) for cell in cells() if cell.name in QUICK]
    assert len(chosen) == len(QUICK)
    assert red(compare(chosen)) == ""


@pytest.mark.slow
def test_every_cell_agrees_with_one_process_over_20_steps() -> None:
    assert {cell.training.steps for cell in cells()} == {20}
    assert red(compare(cells(), timeout_s=280)) == ""


def mean_of_means() -> None:
    """What most trainers do: each micro-batch's mean, averaged."""
    sum_of = CausalLM.loss

    def mean(self: CausalLM, *args: Any) -> LossTerms:
        terms = sum_of(self, *args)
        return LossTerms(terms.total / terms.weight, 1)

    CausalLM.loss = mean  # type: ignore[method-assign]


def skipped_reduce() -> None:
    """Gradients stay those of the rank. The figures, in fp64, are still added."""
    all_reduce = dist.all_reduce

    def only_figures(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return all_reduce(tensor, *args, **kwargs) if tensor.dtype == torch.float64 else None

    dist.all_reduce = only_figures


def clipping_per_rank() -> None:
    """Each rank clips by the norm of its own shards."""
    over_ranks = Sums.over_ranks

    def local_squares(self: Sums, **more: Tensor) -> dict[str, Tensor]:
        return over_ranks(self, **more) | more

    Sums.over_ranks = local_squares  # type: ignore[method-assign]


def replicas_counted_twice() -> None:
    """The norm of HSDP's replicas added up as if they were shards."""
    Placement.copies = lambda self, name: 1  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("sabotage", "zero"),
    [(mean_of_means, 2), (skipped_reduce, 0), (clipping_per_rank, 2), (replicas_counted_twice, 0)],
)
def test_a_broken_engine_turns_a_cell_red(sabotage: Callable[[], None], zero: int) -> None:
    cell = quick(replace(BREAKABLE, layout=replace(BREAKABLE.layout, zero=zero)))
    [row] = compare([cell], sabotage)
    assert not row.passed
    assert max(row.loss / FP32.loss, row.grad_norm / FP32.grad_norm, row.weights / FP32.weights) > 100


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
