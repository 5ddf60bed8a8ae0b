"""The lineage as inline SVG: stages from left to right, each after what it was made from."""

from markupsafe import Markup, escape

from tools.report.read import Life, StageView

WIDTH, HEIGHT = 122, 56
"""Of a box, in CSS pixels."""
GAP_X, GAP_Y = 26, 26
ARC = 20
"""How far an edge that passes over other stages rises for each of them."""


def draw(life: Life) -> Markup:
    """An empty text where there is no stage."""
    if not life.stages:
        return Markup()
    columns = _columns(life)
    rows: dict[str, int] = {}
    taken: dict[int, int] = {}
    for stage in life:
        rows[stage.name] = taken.get(columns[stage.name], 0)
        taken[columns[stage.name]] = rows[stage.name] + 1
    links = [(other, stage.name, same) for stage in life for other, same in stage.inputs.items() if other in columns]
    far = [(columns[b] - columns[a], rows[a] > 0, rows[b] > 0) for a, b, _ in links if columns[b] - columns[a] > 1]
    above = ARC * max((span for span, low, _ in far if not low), default=0)
    below = ARC * max((span for span, low, ends_low in far if low and ends_low), default=0)
    place: dict[str, tuple[float, float]] = {
        name: (4 + column * (WIDTH + GAP_X), 4 + above + row * (HEIGHT + GAP_Y))
        for (name, column), row in zip(columns.items(), rows.values(), strict=True)
    }
    width = 8 + (max(columns.values()) + 1) * (WIDTH + GAP_X) - GAP_X
    height = 8 + above + below + (max(rows.values()) + 1) * (HEIGHT + GAP_Y) - GAP_Y
    edges = [_edge(place[a], place[b], rows[a], rows[b], same) for a, b, same in links]
    boxes = [_box(stage, *place[stage.name]) for stage in life]
    told = "; ".join(f"{s.name} from {', '.join(s.inputs) or 'nothing'}" for s in life)
    return Markup(  # noqa: S704  every text in it is escaped
        f'<svg class="lineage" role="img" aria-label="{escape(told)}" viewBox="0 0 {width} {height}" '
        f'style="min-width: {width * 0.72:.0f}px; max-width: {width}px">{"".join(edges)}{"".join(boxes)}</svg>'
    )


def _columns(life: Life) -> dict[str, int]:
    """The longest way from a stage without inputs. Listed order is never before what a stage needs."""
    columns: dict[str, int] = {}
    for stage in life:
        columns[stage.name] = 1 + max((columns[other] for other in stage.inputs if other in columns), default=-1)
    return columns


def _edge(start: tuple[float, float], end: tuple[float, float], row: int, end_row: int, same: bool) -> str:
    (x1, y1), (x2, y2) = start, end
    kind = "edge" if same else "edge broken"
    span = round((x2 - x1) / (WIDTH + GAP_X))
    if span == 1:
        a, b, middle = x1 + WIDTH, y1 + HEIGHT / 2, y2 + HEIGHT / 2
        path = f"M{a} {b} C{a + GAP_X / 2} {b} {x2 - GAP_X / 2} {middle} {x2} {middle}"
    elif row == 0:  # over the boxes between
        a, b, rise = x1 + WIDTH * 0.7, x2 + WIDTH * 0.3, ARC * span * 4 / 3
        path = f"M{a} {y1} C{a} {y1 - rise} {b} {y2 - rise} {b} {y2}"
    elif end_row == 0:  # along its own row, then up
        a, b = y1 + HEIGHT / 2, x2 + WIDTH * 0.5
        path = f"M{x1 + WIDTH} {a} H{b - 40} Q{b} {a} {b} {y2 + HEIGHT}"
    else:
        a, b, fall = x1 + WIDTH * 0.7, x2 + WIDTH * 0.3, ARC * span * 4 / 3
        path = f"M{a} {y1 + HEIGHT} C{a} {y1 + HEIGHT + fall} {b} {y2 + HEIGHT + fall} {b} {y2 + HEIGHT}"
    return f'<path class="{kind}" d="{path}"/>'


def _box(stage: StageView, x: float, y: float) -> str:
    state = "missing" if stage.artifact is None else "damaged" if stage.note else "done"
    time = f"{stage.seconds:.0f} s" if stage.seconds < 100 else f"{stage.seconds / 60:.1f} min"
    identity, time = (stage.artifact.id[:8], time) if stage.artifact else ("not there", "")
    return (
        f'<g class="box {state}"><rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
        f'<text class="name" x="{x + 10}" y="{y + 22}">{escape(stage.name[:15])}</text>'
        f'<text class="small" x="{x + 10}" y="{y + 41}">{escape(identity)}</text>'
        f'<text class="small" text-anchor="end" x="{x + WIDTH - 9}" y="{y + 41}">{time}</text></g>'
    )
