"""The way of all documents as inline SVG: in from the sources on the left, down through the steps, out to the right.

A band is as wide as the number of its documents. Colours come from the page, so that they follow light and dark.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from data_pipeline.card.figures import counted, cut, number, share

TRUNK, WIDTH = 250, 330
"""Left edge of the band of all documents, and its width, in CSS pixels."""
ENDS = 225, 655
"""Where bands begin on the left and end on the right."""
MARGIN, SIZE = -24, 984
LINE = 21
"""Least height of a band's place: a line of text."""
GAP = 30
"""Between the last band of a row and the next row."""
LEAST = 1.4
"""Of a band that is not empty."""
COLOURS = 6


@dataclass(frozen=True)
class Band:
    """Some documents that go the same way.

    Args:
        name: where from, or where to.
        documents: how many.
        note: what else is said of them.
    """

    name: str
    documents: int
    note: str = ""


@dataclass(frozen=True)
class Step:
    """A place on the way where documents may leave.

    Args:
        name: of the step, or of several.
        documents_in: that come to it.
        dropped: that leave, by reason, the greatest first.
    """

    name: str
    documents_in: int
    dropped: Sequence[Band]

    @property
    def documents_out(self) -> int:
        return self.documents_in - sum(band.documents for band in self.dropped)


def draw(sources: Sequence[Band], steps: Sequence[Step], splits: Sequence[Band]) -> Markup:
    """An empty text where no document came in.

    Args:
        sources: where the documents of the first step come from.
        steps: in order.
        splits: where those of the last step go; the first goes straight on.
    """
    total = steps[0].documents_in if steps else 0
    if not total:
        return Markup()
    scale = WIDTH / total
    parts: list[str] = []
    y = 10.0
    right = float(TRUNK + WIDTH)
    below = y + sum(_place(band, scale) for band in sources) + 14
    for number_, band in enumerate(sources):
        thick, place = _thick(band, scale), _place(band, scale)
        top = y + (place - thick) / 2
        parts.append(_inflow(right - thick, right, below, top, number_ % COLOURS + 1, _told(band, total)))
        parts.append(_label(ENDS[0] - 10, top + thick / 2, "end", band.name, number(band.documents), 26))
        right -= thick
        y += place
    y = below
    for step in steps:
        y = _row(parts, step, y, scale, "drop")
    straight, *others = splits
    last = Step("splits", sum(band.documents for band in splits), others)
    y = _row(parts, last, y, scale, "split")
    parts.append(_trunk(_thick(straight, scale), y, y + 14, _told(straight, last.documents_in)))
    parts.append(_label(TRUNK, y + 32, "start", straight.name, f"{number(straight.documents)}{straight.note}", 60))
    told = "; ".join(f"{s.name}: {s.documents_in:,} in, {s.documents_out:,} out" for s in steps)
    return Markup(  # noqa: S704  every text in it is escaped
        f'<svg class="sankey" role="img" aria-label="{escape(told)}" viewBox="{MARGIN} 0 {SIZE} {y + 46:.0f}">'
        f"{''.join(parts)}</svg>"
    )


def _row(parts: list[str], step: Step, y: float, scale: float, kind: str) -> float:
    """Draw one step; returns where the next one begins."""
    kept = max(LEAST, step.documents_out * scale)
    height = max(44.0, sum(_place(band, scale) for band in step.dropped) + GAP)
    about = share(step.documents_out / step.documents_in) + " kept" if step.documents_in else "nothing came in"
    right, top = TRUNK + max(kept, step.documents_in * scale), y + 12.0
    for band in step.dropped:
        thick, place = _thick(band, scale), _place(band, scale)
        at = top + (place - thick) / 2
        parts.append(_outflow(right - thick, right, y, at, kind, _told(band, step.documents_in)))
        what = f"{number(band.documents)}{band.note}"
        if kind == "drop":
            what += f" · {share(band.documents / step.documents_in)}"
        parts.append(_label(ENDS[1] + 10, at + thick / 2, "start", band.name, what, 24))
        right -= thick
        top += place
    parts.append(_trunk(kept, y, y + height, f"{step.name}: {counted(step.documents_out, 'document')} passed on"))
    if kind == "drop":
        parts.append(f'<line class="rule" x1="20" x2="{TRUNK + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_label(ENDS[0] - 10, y + 15, "end", step.name, about, 19))
    return y + height


def _thick(band: Band, scale: float) -> float:
    return max(LEAST, band.documents * scale)


def _place(band: Band, scale: float) -> float:
    return max(LINE, _thick(band, scale) + 6)


def _told(band: Band, total: int) -> str:
    return f"{band.name}: {counted(band.documents, 'document')}, {share(band.documents / total if total else 0)}"


def _trunk(width: float, top: float, bottom: float, told: str) -> str:
    rectangle = f'x="{TRUNK}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}"'
    return f'<rect class="trunk" {rectangle}><title>{escape(told)}</title></rect>'


def _inflow(left: float, right: float, bottom: float, top: float, colour: int, told: str) -> str:
    """From the left edge round into the part [left, right] of the band below."""
    x, low = ENDS[0], top + right - left
    outer = f"M{x} {top:.1f} C{_mid(x, right)} {top:.1f} {right:.1f} {_mid(top, bottom)} {right:.1f} {bottom:.1f}"
    inner = f"H{left:.1f} C{left:.1f} {_mid(low, bottom)} {_mid(x, left)} {low:.1f} {x} {low:.1f}Z"
    return f'<path class="in c{colour}" d="{outer} {inner}"><title>{escape(told)}</title></path>'


def _outflow(left: float, right: float, top: float, at: float, kind: str, told: str) -> str:
    """Out of the part [left, right] of the band above, round to the right edge."""
    x, low = ENDS[1], at + right - left
    inner = f"M{right:.1f} {top:.1f} C{right:.1f} {_mid(top, at)} {_mid(right, x)} {at:.1f} {x} {at:.1f}"
    outer = f"V{low:.1f} C{_mid(left, x)} {low:.1f} {left:.1f} {_mid(top, low)} {left:.1f} {top:.1f}Z"
    return f'<path class="{kind}" d="{inner} {outer}"><title>{escape(told)}</title></path>'


def _mid(a: float, b: float) -> str:
    return f"{(a + b) / 2:.1f}"


def _label(x: float, y: float, anchor: str, name: str, note: str, length: int) -> str:
    short = escape(cut(name.replace("_", " "), length))
    shown = f'<tspan class="name">{short}</tspan> <tspan class="small">{escape(note)}</tspan>'
    return f'<text x="{x}" y="{y + 4:.1f}" text-anchor="{anchor}">{shown}<title>{escape(name)}</title></text>'
