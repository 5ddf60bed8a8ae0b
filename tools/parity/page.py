"""The matrix as one page: a tile per cell, coloured by how near it is to its gate."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.parity.cells import Cell
from tools.parity.layouts import spell
from tools.parity.run import Row, world_size

HERE = Path(__file__).parent
DECADES = 3
"""Bars and curves begin at a thousandth of the gate and end at it."""
WIDTH, HEIGHT = 120, 26
"""Of the curve in a tile, in its own units."""


@dataclass(frozen=True)
class Bar:
    """One figure of a tile.

    Args:
        label: what differs.
        value: by how much.
        gate: the most it may.
        length: in percent of the bar, by decades; the gate is at 100.
    """

    label: str
    value: float
    gate: float
    length: float


@dataclass(frozen=True)
class Tile:
    """A cell as it is drawn.

    Args:
        row: its figures.
        way: its layouts as words.
        ranks: processes.
        heat: the largest difference in percent of its gate, 100 at most.
        bars: loss, gradient norm, weights.
        curve: points of the loss's difference by step, as an SVG polyline; empty where there is none.
    """

    row: Row
    way: str
    ranks: int
    heat: float
    bars: list[Bar]
    curve: str


def render(rows: Sequence[Row], steps: int) -> str:
    """The whole page as HTML. It loads nothing from anywhere.

    Args:
        rows: cells in the order in which they are shown; those of a family are next to each other.
        steps: that each trained.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    import tools.report

    tiles = [_tile(row) for row in rows]
    families = [
        (family, list(members)) for family, members in itertools.groupby(tiles, lambda tile: tile.row.cell.family)
    ]
    styles = (Path(tools.report.__file__).parent / "page.css", HERE / "page.css")
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"small": lambda value: f"{value:.1e}", "times": _times}
    return environment.get_template("page.html.jinja").render(
        style="\n".join(style.read_text() for style in styles),
        families=families,
        tiles=tiles,
        steps=steps,
        red=[tile for tile in tiles if not tile.row.passed],
        nearest=max((t for t in tiles if t.row.passed), key=lambda t: t.row.margin, default=None),
        seconds=sum(row.seconds for row in rows),
    )


def _tile(row: Row) -> Tile:
    gate = row.cell.gate
    pairs = [
        ("loss", row.loss, gate.loss),
        ("gradient norm", row.grad_norm, gate.grad_norm),
        ("weights", row.weights, gate.weights),
    ]
    bars = [Bar(label, value, limit, _position(value / limit)) for label, value, limit in pairs]
    heat = 100.0 if math.isnan(row.margin) else round(min(100.0, 100 * row.margin), 1)
    return Tile(row, _way(row.cell), world_size(row.cell), heat, bars, _curve(row.steps, gate.loss))


def _times(margin: float) -> str:
    return f"{margin:,.0f}" if margin >= 10 else f"{margin:.1f}"


def _way(cell: Cell) -> str:
    """Where a cell runs, as a word; two where it is resumed."""
    first = _place(cell.engine, spell(cell.layout))
    if cell.resumed is None:
        return first
    return f"{first} → {_place(cell.resumed_engine or cell.engine, spell(cell.resumed))}"


def _place(engine: str, word: str) -> str:
    return word if engine == "native" else f"{engine}: {word}"


def _position(margin: float) -> float:
    """Percent of the way from a thousandth of a gate to the gate; 100 for what has no figure."""
    if math.isnan(margin):
        return 100.0
    if margin == 0:
        return 0.0
    return round(100 * min(1.0, max(0.0, 1 + math.log10(margin) / DECADES)), 1)


def _curve(steps: Sequence[float], gate: float) -> str:
    """The loss's difference by step; the gate is the upper edge, a thousandth of it the lower one."""
    if len(steps) < 2:
        return ""
    heights = [HEIGHT * (1 - _position(step / gate) / 100) for step in steps]
    return " ".join(f"{WIDTH * i / (len(steps) - 1):.1f},{height:.1f}" for i, height in enumerate(heights))
