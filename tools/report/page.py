"""The page: sections put into the template. Every text from a run is escaped; the page loads nothing from anywhere."""

from pathlib import Path

import data_pipeline.card
from data_pipeline.card.figures import number, share, size
from launchers.display import duration
from tools.report import evaluation, graph, sections
from tools.report.read import Life

HERE = Path(__file__).parent
BASE = Path(data_pipeline.card.__file__).parent / "base.css"
"""The style that this page shares with the data card."""


def render(life: Life, title: str) -> str:
    """The whole page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": number, "size": size, "share": share, "time": duration}
    return environment.get_template("page.html.jinja").render(
        title=title,
        style=BASE.read_text() + (HERE / "page.css").read_text(),
        life=life,
        verdict=sections.verdict(life),
        figures=sections.figures(life),
        lineage=graph.draw(life),
        corpora=sections.corpora(life),
        trainings=sections.trainings(life),
        goodputs=sections.goodputs(life),
        scores=evaluation.scores(life),
        samples=evaluation.samples(life),
        handover=evaluation.handover(life),
        weights=sections.weights(life),
        commands=sections.commands(life),
        configs=sections.configs(life),
        environment=sections.environment(life),
    )
