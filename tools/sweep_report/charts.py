"""The learning curves of a sweep, and what is compared against each key."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_pipeline.card.figures import compact
from tools.report.charts import COLOUR, STYLE, svg

LIGHT = {
    "series-1": "#1f5fa8",
    "series-2": "#d4662a",
    "ink": "#1d1c1a",
    "muted": "#6c6860",
    "line": "#e5e1d8",
    "paper": "#fcfbf8",
}
"""For a picture, which cannot follow the page."""
PANELS_IN_A_ROW = 3
SHOWN_SHARE = 0.9
"""Of all values, those that are on the axis; what diverged would press the others into a line."""


@dataclass(frozen=True)
class Trial:
    """One trial as it is drawn.

    Args:
        x: key -> its value: a number of an interval or range, a text of a list.
    """

    number: int
    x: Mapping[str, float | str]
    state: str
    value: float | None
    curve: Sequence[tuple[int, float]]

    @classmethod
    def of(cls, trial: Mapping[str, Any]) -> "Trial":
        curve = [(int(step), value) for step, value in trial["curve"].items() if math.isfinite(value)]
        return cls(trial["number"], trial["params"], trial["state"], trial["value"], curve)


def page(record: Mapping[str, Any]) -> Markup:
    """Both charts for a page, in whose colours they are."""
    label = (
        f"{record['figure']} of {len(record['trials'])} trials over the steps, and against {', '.join(keys(record))}"
    )
    return svg(_draw(record, COLOUR.__getitem__, STYLE), label)


def picture(record: Mapping[str, Any], file: Path) -> None:
    """The same as a PNG file."""
    stand_ins = {COLOUR[name]: colour for name, colour in LIGHT.items()}
    style = {key: stand_ins.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    figure = _draw(record, LIGHT.__getitem__, style | {"font.family": "sans-serif"})
    figure.savefig(file, dpi=130, facecolor=LIGHT["paper"], metadata={"Software": None})


def keys(record: Mapping[str, Any]) -> list[str]:
    """What was tried, the most important first where that is known."""
    swept = list(record["trials"][0]["params"]) if record["trials"] else []
    return sorted(swept, key=lambda key: -record["importance"].get(key, 0))


def _draw(record: Mapping[str, Any], colour: Callable[[str], str], style: Any) -> Any:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    trials = [Trial.of(trial) for trial in record["trials"]]
    swept = keys(record)
    columns = min(PANELS_IN_A_ROW, max(1, len(swept)))
    rows = -(-len(swept) // columns)
    with rc_context(style):
        figure = Figure(figsize=(12.6, 4.2 + 3.2 * rows), layout="constrained")
        grid = figure.add_gridspec(1 + rows, columns, height_ratios=[4.2] + [3.2] * rows)
        limits = _limits(trials, record["maximise"])
        top = figure.add_subplot(grid[0, :])
        _curves(top, trials, record["best"], colour)
        top.set_title(f"{record['figure']} over the steps", pad=10)
        top.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        panels = [figure.add_subplot(grid[1 + i // columns, i % columns]) for i in range(len(swept))]
        for axes, key in zip(panels, swept, strict=True):
            _against(axes, key, trials, record["best"], colour)
            if key in record["logarithmic"]:
                axes.set_xscale("log")
            axes.set_title(key, pad=10)
        for axes in (top, *panels):
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
            if limits:
                axes.set_ylim(*limits)
        return figure


def _curves(axes: Any, trials: Sequence[Trial], best: int | None, colour: Callable[[str], str]) -> None:
    told = set()
    for trial in sorted(trials, key=lambda trial: trial.number == best):
        if not trial.curve:
            continue
        steps, values = zip(*trial.curve, strict=True)
        kind = "best" if trial.number == best else "ended early" if trial.state == "pruned" else "others"
        paint = colour({"best": "series-2", "others": "series-1", "ended early": "muted"}[kind])
        label = None if kind in told else f"trial {best:03d}, the best" if kind == "best" else kind
        told.add(kind)
        alpha, width = (1.0, 2.4) if kind == "best" else (0.55, 1.2)
        axes.plot(steps, values, color=paint, linewidth=width, alpha=alpha, label=label)
        if kind == "ended early":
            axes.plot(steps[-1:], values[-1:], color=paint, marker="x", markersize=6, linestyle="none")
        elif len(steps) == 1:
            axes.plot(steps, values, color=paint, marker="o", markersize=3.5)
    if told:
        axes.legend(loc="best", fontsize=9, handlelength=1.4)


def _against(axes: Any, key: str, trials: Sequence[Trial], best: int | None, colour: Callable[[str], str]) -> None:
    shown = [trial for trial in trials if trial.value is not None]
    if any(isinstance(trial.x[key], str) for trial in shown):
        names = sorted({str(trial.x[key]) for trial in trials}, key=_order)
        place = {name: position for position, name in enumerate(names)}
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        where = [place[str(trial.x[key])] for trial in shown]
    else:
        where = [trial.x[key] for trial in shown]  # type: ignore[misc]
    for trial, x in zip(shown, where, strict=True):
        if trial.number == best:
            axes.plot(x, trial.value, color=colour("series-2"), marker="*", markersize=14, linestyle="none", zorder=3)
        elif trial.state == "done":
            axes.plot(x, trial.value, color=colour("series-1"), marker="o", markersize=5, linestyle="none", alpha=0.8)
        else:
            axes.plot(x, trial.value, color=colour("muted"), marker="x", markersize=5, linestyle="none", alpha=0.8)


def _limits(trials: Sequence[Trial], maximise: bool) -> tuple[float, float] | None:
    """From the best value to where most are."""
    values = sorted(value for trial in trials for _, value in trial.curve)
    values = values or sorted(trial.value for trial in trials if trial.value is not None)
    if len(values) < 2 or values[0] == values[-1]:
        return None
    at = int(SHOWN_SHARE * (len(values) - 1))
    low, high = (values[-1 - at], values[-1]) if maximise else (values[0], values[at])
    margin = 0.06 * (high - low) or 0.06 * (values[-1] - values[0])
    return low - margin, high + margin


def _order(text: str) -> tuple[float, str]:
    """Numbers by their size, then words."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
