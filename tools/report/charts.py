"""Plots as inline SVG that takes its colours from the page, so that they follow light and dark.

matplotlib draws with stand-in colours, which are then replaced by CSS variables. Text stays text.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from data_pipeline.card.figures import compact

SERIES = ("series-1", "series-2", "series-3", "series-4", "series-5", "series-6")
STAND_INS = {f"#0a00{i:02x}": name for i, name in enumerate((*SERIES, "ink", "muted", "line", "paper"))}
COLOUR = {name: stand_in for stand_in, name in STAND_INS.items()}
MOST_POINTS = 500
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "longrun",
    "font.size": 10,
    "axes.edgecolor": COLOUR["line"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.titlecolor": COLOUR["ink"],
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOUR["line"],
    "grid.linewidth": 0.8,
    "text.color": COLOUR["ink"],
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": COLOUR["muted"],
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        label: in the legend; empty for none.
        colour: number of the series, from 0.
        noisy: draw the points faintly and their running mean on top.
        marked: draw a dot at each point.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    noisy: bool = False
    marked: bool = False


def lines(title: str, curves: Sequence[Line], *, wide: bool = False, percent: bool = False) -> Markup:
    """A line chart over steps; an empty text where there is nothing to draw.

    Args:
        title: what the y axis shows, with its unit.
        curves: those without points are left out.
        wide: twice the width.
        percent: the values are shares.
    """
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return Markup()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    with rc_context(STYLE):
        figure = Figure(figsize=(12.6, 4.2) if wide else (4.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            x, y = thinned(curve.x), thinned(curve.y)
            colour = COLOUR[SERIES[curve.colour % len(SERIES)]]
            if curve.noisy and len(y) > 20:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
                y = smoothed(y)
            # A single point is no line.
            marker = "o" if curve.marked or len(x) == 1 else None
            axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=curve.label)
        axes.set_title(title, pad=10)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        if any(curve.label for curve in curves):
            axes.legend(loc="best", fontsize=9, handlelength=1.4)
        axes.margins(x=0.02)
        told = [f"{c.label} {c.y[0]:.4g} at step {c.x[0]:g}, {c.y[-1]:.4g} at step {c.x[-1]:g}" for c in curves]
        return svg(figure, f"{title}: {'; '.join(told)}")


def svg(figure: Any, label: str) -> Markup:
    """A figure drawn with the stand-in colours of `STYLE`, as part of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, name in STAND_INS.items():
        text = text.replace(stand_in, f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="([0-9.]+)pt"', r'\1 style="max-width: \2pt"', text, count=1)
    text = re.sub(r"font: ([0-9. ]*)([0-9]+px) [^;\"]*", r"font-weight: 400; font-size: \2", text)
    return Markup(text.replace("<svg", '<svg role="img" aria-label="' + str(Markup.escape(label)) + '"', 1))  # noqa: S704  Matplotlib's


def thinned(values: Sequence[float]) -> list[float]:
    """At most `MOST_POINTS` of them: means of neighbours, the last one as it is."""
    if len(values) <= MOST_POINTS:
        return list(values)
    size = -(-len(values) // MOST_POINTS)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts[:-1]] + [values[-1]]


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each point and its neighbours, over a twentieth of the curve."""
    reach = max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        near = values[max(0, i - reach) : i + reach + 1]
        means.append(sum(near) / len(near))
    return means
