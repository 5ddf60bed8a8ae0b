"""The page: sections put into the template. Every text from a run is escaped; the page loads nothing from anywhere."""

from pathlib import Path
from typing import Any

from launchers.display import duration
from tools.report import evaluation, graph, sections
from tools.report.read import Life

HERE = Path(__file__).parent


def render(life: Life, title: str) -> str:
    """The whole page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": number, "size": size, "share": share, "time": duration}
    return environment.get_template("page.html.jinja").render(
        title=title,
        style=(HERE / "page.css").read_text(),
        life=life,
        verdict=sections.verdict(life),
        figures=sections.figures(life),
        lineage=graph.draw(life),
        corpora=sections.corpora(life),
        trainings=sections.trainings(life),
        scores=evaluation.scores(life),
        samples=evaluation.samples(life),
        handover=evaluation.handover(life),
        weights=sections.weights(life),
        commands=sections.commands(life),
        configs=sections.configs(life),
        environment=sections.environment(life),
    )


def number(value: Any) -> str:
    """1,234,567 or 0.1235; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(value: float) -> str:
    """Bytes with a decimal prefix, as disks and networks count."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def share(value: float) -> str:
    return f"{value:.1%}"
