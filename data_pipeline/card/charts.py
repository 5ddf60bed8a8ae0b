"""Histograms as inline SVG that takes its colours from the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from data_pipeline.card.figures import compact

WIDTH, HEIGHT = 420, 190
LEFT, BOTTOM, TOP = 46, 24, 18
LABELS = 6
"""Most labels on the horizontal axis."""


@dataclass(frozen=True)
class Series:
    """Documents by bin.

    Args:
        name: in the legend.
        counts: bin -> documents.
        style: a class of the style sheet.
    """

    name: str
    counts: Mapping[float, int]
    style: str


def histogram(title: str, series: Sequence[Series], names: Mapping[float, str]) -> Markup:
    """Bars of several series, each in front of the one before; an empty text where there is nothing to draw.

    Args:
        title: what is counted.
        series: what is drawn, the largest first.
        names: bin -> label, for every bin from the first to the last.
    """
    bins = sorted(names)
    tallest = max((count for one in series for count in one.counts.values()), default=0)
    if not tallest:
        return Markup()
    step = (WIDTH - LEFT) / len(bins)
    bars = []
    for depth, one in enumerate(series):
        inset = 0.06 * step + depth * 0.12 * step
        for place, at in enumerate(bins):
            if count := one.counts.get(at, 0):
                high = max(1.0, count / tallest * (HEIGHT - TOP - BOTTOM))
                box = f'x="{LEFT + place * step + inset:.1f}" y="{HEIGHT - BOTTOM - high:.1f}"'
                box += f' width="{step - 2 * inset:.1f}" height="{high:.1f}"'
                told = f"{names[at]}: {count:,} {one.name}"
                bars.append(f'<rect class="{one.style}" {box}><title>{escape(told)}</title></rect>')
    every = -(-len(bins) // LABELS)
    marks = [
        f'<text class="small" x="{LEFT + (place + 0.5) * step:.1f}" y="{HEIGHT - 7}" text-anchor="middle">'
        f"{escape(names[at])}</text>"
        for place, at in enumerate(bins)
        if place % every == 0
    ]
    grid = []
    for part in (0.0, 0.5, 1.0):
        y = HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)
        grid.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        grid.append(
            f'<text class="small" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{compact(part * tallest)}</text>'
        )
    told = "; ".join(f"{one.name} {sum(one.counts.values()):,}" for one in series)
    return Markup(  # noqa: S704  every text in it is escaped
        f'<svg class="histogram" role="img" aria-label="{escape(title)}: {escape(told)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(grid)}{"".join(bars)}{"".join(marks)}</svg>'
    )
