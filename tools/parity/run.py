"""Run cells, and hold each against one process that trains the same.

All cells of one world size and engine share one set of processes. A cell that fails, dies or hangs takes its set along;
the cells after it go on in a new one.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from parallel import distributed
from parallel.layout import Layout
from tools.parity.cells import Cell
from tools.parity.training import Training, Trajectory, build, train
from tools.ranks import RanksError, stream_ranks


@dataclass(frozen=True)
class Row:
    """A cell's differences: see `Gate`.

    Args:
        cell: what was compared.
        loss, grad_norm, weights: the largest differences; nan where there are none.
        failure: why there are none; its first line says it in short.
        steps: difference of the loss at each step.
        seconds: that the cell took.
    """

    cell: Cell
    loss: float
    grad_norm: float
    weights: float
    failure: str = ""
    steps: tuple[float, ...] = ()
    seconds: float = 0.0

    @property
    def margin(self) -> float:
        """The largest difference as a share of its gate; above 1 is red."""
        gate = self.cell.gate
        return _largest((self.loss / gate.loss, self.grad_norm / gate.grad_norm, self.weights / gate.weights))

    @property
    def passed(self) -> bool:
        return self.margin <= 1  # a nan is not

    @property
    def reason(self) -> str:
        """Why it failed, in a line."""
        return self.failure.split("\n")[0]

    def __str__(self) -> str:
        return self.line(len(self.cell.name))

    def line(self, width: int) -> str:
        """The row as text, the name in so many columns."""
        figures = self.reason or f"{self.loss:9.1e} {self.grad_norm:9.1e} {self.weights:9.1e}"
        return f"{'ok ' if self.passed else 'RED'} {self.cell.name:{width}} {world_size(self.cell):5d} {figures}"


@dataclass(frozen=True)
class Leg:
    """A stretch of training without a break: a cell, one half of a cell that is resumed, or what it is held against.

    Args:
        name: of the cell, and of the checkpoint between two halves.
        layout, training, engine: as in `Cell`.
        steps: which steps.
        loads, saves: whether it starts from the checkpoint, and whether it leaves one.
    """

    name: str
    layout: Layout
    training: Training
    engine: str
    steps: range
    loads: bool = False
    saves: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a leg.

    Args:
        found: None where it failed.
        failure: why.
        seconds: that it took.
    """

    found: Trajectory | None
    failure: str = ""
    seconds: float = 0.0


def world_size(cell: Cell) -> int:
    """The most processes that a cell runs on."""
    return max(cell.layout.world_size, cell.resumed.world_size if cell.resumed else 0)


def compare(chosen: Sequence[Cell], sabotage: Callable[[], None] | None = None, timeout_s: float = 300) -> list[Row]:
    """The rows of some cells, in their order; see `stream`."""
    rows = {row.cell.name: row for row in stream(chosen, sabotage, timeout_s)}
    return [rows[cell.name] for cell in chosen]


def stream(chosen: Sequence[Cell], sabotage: Callable[[], None] | None = None, timeout_s: float = 300) -> Iterator[Row]:
    """Run cells and the single processes they are held against; each row as soon as it is known.

    Args:
        chosen: cells, with different names.
        sabotage: called on every rank of the cells before they start: tests break the engine with it.
        timeout_s: for each stretch of training.
    """
    cells = {cell.name: cell for cell in chosen}
    trainings = dict.fromkeys(_alone(cell.training) for cell in chosen)
    alone = [Leg("alone", Layout(), training, "native", range(training.steps)) for training in trainings]
    expected = {leg.training: outcome for leg, outcome in _run(alone, "", None, timeout_s)}
    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        halves: dict[str, Outcome] = {}
        for leg, outcome in _run([_first(cell) for cell in chosen], directory, sabotage, timeout_s):
            if leg.saves and outcome.found:
                halves[leg.name] = outcome
            else:
                yield _row(cells[leg.name], outcome, expected)
        for leg, outcome in _run([_second(cells[name]) for name in halves], directory, sabotage, timeout_s):
            yield _row(cells[leg.name], _joined(halves[leg.name], outcome), expected)


def _alone(training: Training) -> Training:
    """What bf16 and compiled blocks are held against is fp32, as it is written."""
    return replace(training, precision="fp32", compile=False)


def _first(cell: Cell) -> Leg:
    steps = range(cell.training.steps // 2 if cell.resumed else cell.training.steps)
    return Leg(cell.name, cell.layout, cell.training, cell.engine, steps, saves=cell.resumed is not None)


def _second(cell: Cell) -> Leg:
    assert cell.resumed is not None
    steps = range(cell.training.steps // 2, cell.training.steps)
    return Leg(cell.name, cell.resumed, cell.training, cell.resumed_engine or cell.engine, steps, loads=True)


def _joined(first: Outcome, second: Outcome) -> Outcome:
    seconds = first.seconds + second.seconds
    if first.found is None or second.found is None:
        return replace(second, seconds=seconds)
    a, b = first.found, second.found
    return Outcome(Trajectory(a.losses + b.losses, a.grad_norms + b.grad_norms, b.weights), seconds=seconds)


def _row(cell: Cell, outcome: Outcome, expected: dict[Training, Outcome]) -> Row:
    held_against = expected[_alone(cell.training)]
    if held_against.found is None:
        return failed(cell, f"one process: {held_against.failure}", outcome.seconds)
    if outcome.found is None:
        return failed(cell, outcome.failure, outcome.seconds)
    return replace(difference(cell, outcome.found, held_against.found), seconds=outcome.seconds)


def failed(cell: Cell, failure: str, seconds: float = 0.0) -> Row:
    """The row of a cell that has no figures."""
    return Row(cell, math.nan, math.nan, math.nan, failure, seconds=seconds)


def difference(cell: Cell, found: Trajectory, expected: Trajectory) -> Row:
    """The largest differences of two trainings."""
    steps = [abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)]
    norms = [abs(a - b) / max(b, 1e-12) for a, b in zip(found.grad_norms, expected.grad_norms, strict=True)]
    if missing := sorted(expected.weights.keys() ^ found.weights.keys()):
        return failed(cell, f"these weights are in one of the two only: {', '.join(missing)}")
    weights = [
        float((found.weights[name] - w).norm() / w.norm().clamp(min=1e-12)) for name, w in expected.weights.items()
    ]
    return Row(cell, _largest(steps), _largest(norms), _largest(weights), steps=tuple(steps))


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def _run(
    legs: Sequence[Leg], directory: str, sabotage: Callable[[], None] | None, timeout_s: float
) -> Iterator[tuple[Leg, Outcome]]:
    def together(leg: Leg) -> tuple[int, str]:
        return leg.layout.world_size, leg.engine

    for (size, _), here in itertools.groupby(sorted(legs, key=together), together):
        left = list(here)
        while left:
            began = time.monotonic()
            try:
                for answers in stream_ranks(size, _train, tuple(left), directory, sabotage, timeout_s=timeout_s):
                    yield left.pop(0), Outcome(answers[0], seconds=time.monotonic() - began)
                    began = time.monotonic()
            except RanksError as error:
                yield left.pop(0), Outcome(None, str(error), time.monotonic() - began)


def _train(legs: Sequence[Leg], directory: str, sabotage: Callable[[], None] | None) -> Iterator[Trajectory]:
    """On each rank: one leg after the other, each in a process group of its own."""
    if sabotage:
        sabotage()
    for leg in legs:
        # Where weights are loaded, others come first, so that a cell is red if one is not replaced.
        engine = build(leg.layout, leg.training, distributed.start(), seed=int(leg.loads), engine=leg.engine)
        if leg.loads:
            dcp.load(engine.state(), checkpoint_id=f"{directory}/{leg.name}")
            engine.loaded()
        found = train(engine, leg.layout, leg.training, leg.steps)
        if leg.saves:
            dcp.save(engine.state(), checkpoint_id=f"{directory}/{leg.name}")
        dist.barrier()
        distributed.stop()
        yield found
