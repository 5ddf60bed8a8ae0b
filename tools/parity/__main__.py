"""`python -m tools.parity`: which cells, how they are shown, and the exit status."""

import dataclasses
import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import train.config  # noqa: F401  registers the groups that may be given: model, objective, optim
from conf import entry
from conf.errors import Problem
from conf.registry import OPTIONS, register
from tools.parity.cells import BF16, FP32, GIVEN, QUICK, Cell, cells
from tools.parity.layouts import WordError, parse, spell
from tools.parity.page import render
from tools.parity.run import Row, stream, world_size
from tools.parity.training import SEQUENCES
from train.objectives.dpo import DPO


@register("", "parity_schema")
@dataclass(frozen=True)
class ParityConfig:
    """Does every layout train the same run? Trains small models on up to 8 processes of this machine, and holds each
    against one process. `model=`, `objective=` and `optim=` replace what the chosen cells declare.

    Args:
        layouts: any layouts, as in `layouts=[tp2,pp2.dp2.zero1]`: pp, dp_replicate, dp, cp, tp, ep, zero, mb
            (micro-batches) and v (model chunks per rank), each with its number, a schedule's name, recompute_full and
            the like, joined by `.` or `x`.
        cells: which cells of the matrix, as patterns of their names; "quick" for a dozen that meet every technique.
            Without `layouts` and `cells` it is these. `cells=[]` lists the names.
        engines: what the layouts run on; of the cells, those of these engines only. Empty for native, and for all.
        model: shape of the decoder, an option of the group `model` such as smoke.
        objective: an option of the group `objective`.
        optim: an option of the group `optim`.
        precision: "fp32" or "bf16" of the cells; empty for what each declares.
        steps: optimizer steps of each.
        timeout_s: seconds after which a cell is given up.
        json: file for the figures; empty for none.
        html: file for the same as a page; empty for none.
    """

    layouts: list[str] = field(default_factory=list)
    cells: list[str] | None = None
    engines: list[str] = field(default_factory=list)
    model: Any = None
    objective: Any = None
    optim: Any = None
    precision: str = ""
    steps: int = 20
    timeout_s: float = 300
    json: str = ""
    html: str = ""

    def problems(self) -> list[Problem]:
        """Words that are no layouts, layouts that cannot be, patterns that match nothing, too few steps."""
        found = [problem for word in self.layouts for problem in _word_problems(word)]
        found += [
            Problem("cells", pattern, f"matches none of quick, {', '.join(cell.name for cell in cells())}")
            for pattern in self.cells or ()
            if pattern != "quick" and not fnmatch.filter([cell.name for cell in cells()], pattern)
        ]
        engines = sorted(name for group, name in OPTIONS if group == "engine")
        found += [
            Problem("engines", name, f"one of {', '.join(engines)}") for name in self.engines if name not in engines
        ]
        if self.precision not in ("", "fp32", "bf16"):
            found.append(Problem("precision", self.precision, "one of fp32, bf16"))
        if self.steps < 2:
            found.append(Problem("steps", self.steps, "must be at least 2: one before a resume, one after"))
        if not found:
            chosen = self.chosen()
            found = [problem for cell in chosen for problem in _cell_problems(cell)]
            if not chosen and self.cells != []:
                fix = "leave none of the cells; give cells of these engines, or layouts="
                found.append(Problem("engines", self.engines, fix))
        return found

    def chosen(self) -> list[Cell]:
        """What is to be run."""
        return [self._changed(cell) for cell in (*self._given(), *self._named())]

    def _given(self) -> Iterator[Cell]:
        for engine in self.engines or ["native"]:
            for word in dict.fromkeys(spell(parse(word)) for word in self.layouts):
                name = word if engine == "native" else f"{engine}:{word}"
                yield Cell(name, parse(word), engine=engine)

    def _named(self) -> Iterator[Cell]:
        everything = ["*"] if self.engines else ["quick"]  # the quick cells are the native engine's
        patterns = self.cells if self.cells is not None else [] if self.layouts else everything
        for cell in cells():
            here = not self.engines or {cell.engine, cell.resumed_engine or cell.engine} <= set(self.engines)
            if here and any(fnmatch.fnmatch(cell.name, p) or (p == "quick" and cell.name in QUICK) for p in patterns):
                yield cell

    def _changed(self, cell: Cell) -> Cell:
        given = {name: getattr(self, name) for name in ("model", "objective", "optim", "precision")}
        training = replace(cell.training, steps=self.steps, **{name: value for name, value in given.items() if value})
        gate = cell.gate if not self.precision else FP32 if self.precision == "fp32" else BF16
        return replace(cell, training=training, gate=gate)


def _word_problems(word: str) -> list[Problem]:
    try:
        parse(word)
    except WordError as error:
        return [Problem("layouts", word, str(error).removeprefix(f"{word}: "))]
    return []


def _cell_problems(cell: Cell) -> list[Problem]:
    """Why a cell cannot run."""
    training = cell.training
    batch = SEQUENCES // 2 if isinstance(training.objective, DPO) else SEQUENCES  # a pair stays together
    return [
        Problem("layouts" if cell.family == GIVEN else "cells", cell.name, str(problem))
        for layout in (cell.layout, cell.resumed)
        if layout is not None
        for problem in layout.problems(layout.world_size, batch, training.model.sizes)
    ]


def main(config: ParityConfig, resolved: dict[str, Any]) -> int:
    """Print one row per cell as soon as it is known; 1 if any is red."""
    if config.cells == [] and not config.layouts:
        print("\n".join(cell.name for cell in cells()))
        return 0
    chosen = config.chosen()
    width = max(len(name) for name in ["against one process", *(cell.name for cell in chosen)])
    print(
        f"    {'against one process':{width}} ranks    |loss| grad norm   weights   ({config.steps} steps)", flush=True
    )
    rows = {}
    for row in stream(chosen, timeout_s=config.timeout_s):
        rows[row.cell.name] = row
        print(row.line(width), flush=True)
    ordered = [rows[cell.name] for cell in chosen]
    if config.json:
        Path(config.json).write_text(json.dumps(figures(ordered, config.steps), indent=1) + "\n")
    if config.html:
        Path(config.html).write_text(render(ordered, config.steps))
    red = sum(not row.passed for row in ordered)
    print(f"{len(rows) - red} of {len(rows)} cells agree" + (f"; {red} are over their gate or failed" if red else ""))
    return 1 if red else 0


def figures(rows: list[Row], steps: int) -> dict[str, Any]:
    """The rows as plain values."""
    return {
        "steps": steps,
        "passed": all(row.passed for row in rows),
        "cells": [
            {
                "name": row.cell.name,
                "family": row.cell.family,
                "engine": row.cell.engine,
                "layout": spell(row.cell.layout),
                "resumed": spell(row.cell.resumed) if row.cell.resumed else None,
                "resumed_engine": row.cell.resumed_engine or None,
                "ranks": world_size(row.cell),
                "passed": row.passed,
                "loss": _finite(row.loss),
                "grad_norm": _finite(row.grad_norm),
                "weights": _finite(row.weights),
                "gate": dataclasses.asdict(row.cell.gate),
                "margin": _finite(row.margin),
                "loss_by_step": [_finite(step) for step in row.steps],
                "failure": row.failure,
                "seconds": round(row.seconds, 2),
            }
            for row in rows
        ],
    }


def _finite(value: float) -> float | None:
    """JSON knows no nan."""
    return value if abs(value) < float("inf") else None


if __name__ == "__main__":
    entry.run("parity", ParityConfig, main)
