"""`python -m tools.parity`: every layout trains the same run.

Each cell trains a small decoder for some steps on uneven label masks and several documents per sequence, from one
initialisation, and is held against one process that does the same in one micro-batch: largest difference of the loss
over the steps, of the gradient norm, and of the final weights. The exit status is 1 when a cell is over its gate.

Shape suffixes: B sequences, L tokens.
"""

import dataclasses
import fnmatch
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from conf import entry
from conf.errors import Problem
from conf.registry import register
from data_pipeline.batch import IGNORED, MicroBatch
from parallel import distributed
from parallel.engine import Settings
from parallel.engines.native import Native, NativeEngine
from parallel.layout import Layout
from tools.ranks import run_ranks
from train.models.transformer import DecoderConfig, initialise
from train.objectives.clm import CausalLM
from train.optim.adamw import AdamW
from train.optim.muon import Muon

VOCABULARY, SEQUENCES, LENGTH = 97, 8, 32
"""97 rows split over no number of ranks evenly."""

MODEL = DecoderConfig(layers=4, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16)
ADAMW = AdamW(lr=1e-3, eps=1e-6)
MUON = Muon(precision="fp32", eps=1e-6)


@dataclass(frozen=True)
class Training:
    """What is trained: the same in a cell and in the single process that it is held against.

    Args:
        optim: an option of the group `optim`.
        model: shape of the decoder.
        ema: decay of the averaged weights; where above 0, they are compared instead of the last ones.
        precision: of forward and backward.
        clip: largest gradient norm; small enough to bite.
        steps: optimizer steps.
    """

    optim: Any = ADAMW
    model: DecoderConfig = MODEL
    ema: float = 0.0
    precision: str = "fp32"
    clip: float = 0.5
    steps: int = 20


@dataclass(frozen=True)
class Gate:
    """The largest differences that a correct layout may show.

    Args:
        loss: absolute, in nats per token, at any step.
        grad_norm: relative, at any step.
        weights: relative, |difference| / |weights| of any final tensor.
    """

    loss: float = 5e-6
    grad_norm: float = 1e-5
    weights: float = 1e-5


FP32 = Gate()
BF16 = Gate(loss=2e-3, grad_norm=5e-2, weights=5e-2)
"""Against one process in fp32: what rounding to 8 bits costs, and no more."""


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Args:
        name: how it is called and chosen.
        layout: where it runs.
        training: what it does there.
        resumed: layout of the second half of the steps, from a checkpoint of the first; None trains in one go.
        gate: when it is red.
    """

    name: str
    layout: Layout
    training: Training = Training()
    resumed: Layout | None = None
    gate: Gate = FP32


@dataclass(frozen=True)
class Trajectory:
    """What a training leaves behind.

    Args:
        losses: one per step.
        grad_norms: one per step.
        weights: final full weights by name; the averaged ones where there are any.
    """

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A cell's differences: see `Gate`."""

    cell: Cell
    loss: float
    grad_norm: float
    weights: float

    @property
    def passed(self) -> bool:
        gate = self.cell.gate
        # A nan is not below a gate.
        return self.loss <= gate.loss and self.grad_norm <= gate.grad_norm and self.weights <= gate.weights

    def __str__(self) -> str:
        verdict = "ok " if self.passed else "RED"
        return (
            f"{verdict} {self.cell.name:28} {self.cell.layout.world_size:5d} "
            f"{self.loss:9.1e} {self.grad_norm:9.1e} {self.weights:9.1e}"
        )


def cells() -> list[Cell]:
    """The matrix. A new path joins it or does not exist."""
    muon = Training(optim=MUON)
    untied = Training(model=replace(MODEL, tied=False, qkv_bias=True, qk_norm=True))
    dropped = Training(model=replace(MODEL, dropout=0.1))
    averaged = Training(ema=0.9)
    everything = Training(optim=MUON, model=dropped.model, ema=0.9)
    bf16 = Training(precision="bf16")
    two = [Layout(dp_shard=2, zero=zero, micro_batches=2) for zero in range(4)]
    four = [Layout(dp_replicate=2, dp_shard=2, zero=zero, micro_batches=2) for zero in range(4)]
    return [
        *(Cell(f"accumulation-{m}", Layout(micro_batches=m)) for m in (2, 4)),
        *(Cell(f"zero{zero}", layout) for zero, layout in enumerate(two)),
        *(Cell(f"zero{zero}-accumulation-1", replace(layout, micro_batches=1)) for zero, layout in enumerate(two)),
        *(Cell(f"hsdp-zero{zero}", four[zero]) for zero in (0, 1, 2, 3)),
        Cell("zero3-4-ranks", Layout(dp_shard=4, zero=3, micro_batches=2)),
        *(Cell(f"muon-zero{zero}", layout, muon) for zero, layout in enumerate(two)),
        Cell("muon-hsdp-zero2", four[2], muon),
        *(Cell(f"untied-zero{zero}", two[zero], untied) for zero in (1, 3)),
        *(Cell(f"dropout-zero{zero}", two[zero], dropped) for zero in (0, 3)),
        *(Cell(f"ema-zero{zero}", two[zero], averaged) for zero in (0, 3)),
        *(Cell(f"bf16-zero{zero}", layout, bf16, gate=BF16) for zero, layout in enumerate(two)),
        Cell("resume-zero3-then-alone", two[3], everything, resumed=Layout()),
        Cell("resume-alone-then-zero2", Layout(micro_batches=4), everything, resumed=two[2]),
        Cell("resume-hsdp-then-zero1", four[3], everything, resumed=two[1]),
    ]


def compare(chosen: Sequence[Cell], sabotage: Callable[[], None] | None = None, timeout_s: float = 300) -> list[Row]:
    """Run cells and the single processes they are held against.

    Args:
        chosen: cells; those of one world size share one set of processes.
        sabotage: called on every rank of the cells before they start: tests break the engine with it.
        timeout_s: for each set of processes.
    """
    references = {_alone(cell.training): None for cell in chosen}
    alone = [Cell("alone", Layout(), training) for training in references]
    [trajectories] = run_ranks(1, _train_all, alone, None, None, timeout_s=timeout_s)
    expected = dict(zip(references, trajectories, strict=True))
    rows = {}
    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        halves: dict[str, Trajectory] = {}
        for size in sorted({cell.layout.world_size for cell in chosen}):
            here = [cell for cell in chosen if cell.layout.world_size == size]
            results = run_ranks(size, _train_all, here, directory, sabotage, timeout_s=timeout_s)[0]
            halves.update({cell.name: found for cell, found in zip(here, results, strict=True)})
        for size in sorted({cell.resumed.world_size for cell in chosen if cell.resumed}):
            here = [cell for cell in chosen if cell.resumed and cell.resumed.world_size == size]
            results = run_ranks(size, _resume_all, here, directory, sabotage, timeout_s=timeout_s)[0]
            for cell, second in zip(here, results, strict=True):
                first = halves[cell.name]
                halves[cell.name] = Trajectory(
                    first.losses + second.losses, first.grad_norms + second.grad_norms, second.weights
                )
    for cell in chosen:
        rows[cell.name] = difference(cell, halves[cell.name], expected[_alone(cell.training)])
    return list(rows.values())


def _alone(training: Training) -> Training:
    """What bf16 is held against is fp32."""
    return replace(training, precision="fp32")


def difference(cell: Cell, found: Trajectory, expected: Trajectory) -> Row:
    """The largest differences of two trainings."""
    pairs = list(zip(found.losses, expected.losses, strict=True))
    norms = list(zip(found.grad_norms, expected.grad_norms, strict=True))
    return Row(
        cell,
        loss=_largest(abs(a - b) for a, b in pairs),
        grad_norm=_largest(abs(a - b) / b for a, b in norms),
        weights=_largest(
            float((found.weights[name] - w).norm() / w.norm().clamp(min=1e-12)) for name, w in expected.weights.items()
        ),
    )


def _largest(values: Any) -> float:
    values = list(values)
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def _train_all(chosen: list[Cell], directory: str | None, sabotage: Callable[[], None] | None) -> list[Trajectory]:
    """On each rank: all cells of one world size; the first half of those that are resumed."""
    if sabotage:
        sabotage()
    world = distributed.start()
    found = []
    for cell in chosen:
        engine = build(cell.layout, cell.training, world)
        half = cell.training.steps // 2 if cell.resumed else cell.training.steps
        found.append(train(engine, cell.layout, cell.training, range(half)))
        if cell.resumed:
            dcp.save(engine.state(), checkpoint_id=f"{directory}/{cell.name}")
    distributed.stop()
    return found


def _resume_all(chosen: list[Cell], directory: str, sabotage: Callable[[], None] | None) -> list[Trajectory]:
    """On each rank: the second half of the cells that are resumed."""
    if sabotage:
        sabotage()
    world = distributed.start()
    found = []
    for cell in chosen:
        assert cell.resumed is not None
        engine = build(cell.resumed, cell.training, world, seed=1)  # other weights, which loading must replace
        dcp.load(engine.state(), checkpoint_id=f"{directory}/{cell.name}")
        engine.loaded()
        found.append(train(engine, cell.resumed, cell.training, range(cell.training.steps // 2, cell.training.steps)))
    distributed.stop()
    return found


def build(layout: Layout, training: Training, world: distributed.World, seed: int = 0) -> NativeEngine:
    """An engine with a small decoder.

    Args:
        layout: where it runs.
        training: what it does.
        world: this process.
        seed: of the initial weights; dropout is keyed by 0 always.
    """
    with torch.device("meta"):
        model = training.model.build(VOCABULARY)
    return Native().build(
        model,
        layout,
        training.optim.build,
        world=world,
        settings=Settings(precision=training.precision, clip=training.clip, ema=training.ema),
        initialise=lambda placed: initialise(placed, seed),  # type: ignore[arg-type]
    )


def train(engine: NativeEngine, layout: Layout, training: Training, steps: range) -> Trajectory:
    """Train on this rank's share of the global batches of `steps`."""
    losses, norms = [], []
    for step in steps:
        share = shares(batch_of(step), engine.dp_rank, engine.dp_size, layout.micro_batches)
        result = engine.train_step(share, CausalLM(), 1.0)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    return Trajectory(losses, norms, engine.weights(ema=training.ema > 0))


def batch_of(step: int) -> MicroBatch:
    """A global batch of random tokens: the first sequences are labelled almost everywhere, the last almost nowhere, and
    each holds two documents."""
    generator = torch.Generator().manual_seed(step)
    tokens_BL = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    labels_BL = tokens_BL[:, 1:].clone()
    ignored_B = torch.linspace(0, 0.9, SEQUENCES)
    labels_BL[torch.rand(SEQUENCES, LENGTH, generator=generator) < ignored_B[:, None]] = IGNORED
    cut_B = torch.randint(LENGTH // 4, LENGTH, (SEQUENCES,), generator=generator)
    positions_L = torch.arange(LENGTH)
    documents_BL = (positions_L >= cut_B[:, None]).long()
    return MicroBatch(
        tokens_BL=tokens_BL[:, :-1].contiguous(),
        labels_BL=labels_BL,
        positions_BL=positions_L - documents_BL * cut_B[:, None],
        documents_BL=documents_BL,
        samples_B=torch.arange(SEQUENCES) + step * SEQUENCES,
    )


def shares(batch: MicroBatch, dp_rank: int, dp_size: int, micro_batches: int) -> list[MicroBatch]:
    """One rank's part of a global batch, in micro-batches."""
    fields = [f.name for f in dataclasses.fields(batch)]
    parts = {name: getattr(batch, name).chunk(dp_size)[dp_rank].chunk(micro_batches) for name in fields}
    return [MicroBatch(**{name: parts[name][i] for name in fields}) for i in range(micro_batches)]


@register("", "parity_schema")
@dataclass(frozen=True)
class ParityConfig:
    """Does every layout train the same run? Trains small models on 1, 2 and 4 processes of this machine.

    Args:
        cells: which comparisons, as patterns of their names; `cells=[]` lists the names.
        steps: optimizer steps of each.
        timeout_s: seconds after which a set of processes is given up.
    """

    cells: list[str] = field(default_factory=lambda: ["*"])
    steps: int = 20
    timeout_s: float = 900

    def problems(self) -> list[Problem]:
        """Patterns that match nothing; too few steps."""
        names = [cell.name for cell in cells()]
        found = [
            Problem("cells", pattern, f"matches none of {', '.join(names)}")
            for pattern in self.cells
            if not fnmatch.filter(names, pattern)
        ]
        if self.steps < 2:
            found.append(Problem("steps", self.steps, "must be at least 2: one before a resume, one after"))
        return found


def main(config: ParityConfig, resolved: dict[str, Any]) -> int:
    """Print one row per cell; 1 if any is red."""
    if not config.cells:
        print("\n".join(cell.name for cell in cells()))
        return 0
    chosen = [
        replace(cell, training=replace(cell.training, steps=config.steps))
        for cell in cells()
        if any(fnmatch.fnmatch(cell.name, pattern) for pattern in config.cells)
    ]
    rows = compare(chosen, timeout_s=config.timeout_s)
    print(f"    {'against one process':28} ranks    |loss| grad norm   weights   ({config.steps} steps)")
    print("\n".join(map(str, rows)))
    red = sum(not row.passed for row in rows)
    print(f"{len(rows) - red} of {len(rows)} cells agree" + (f"; {red} are over their gate" if red else ""))
    return 1 if red else 0


if __name__ == "__main__":
    entry.run("parity", ParityConfig, main)
