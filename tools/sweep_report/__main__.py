"""`python -m tools.sweep_report root=runs/sweeps/lr`: `sweep.html` and `plot.png` of a sweep, also of one under way."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import data_pipeline.card
from conf import entry
from conf.errors import LongrunError
from conf.registry import register
from data_pipeline.artifact import write_atomically
from data_pipeline.card.figures import number, share
from launchers.display import duration
from launchers.sweep.record import FILE, shown
from tools.sweep_report import charts

HERE = Path(__file__).parent
STYLE = Path(data_pipeline.card.__file__).parent / "base.css"
PAGE, PLOT = "sweep.html", "plot.png"


class NoSweepError(LongrunError):
    """There is no sweep in the directory."""


@register("", "sweep_report_schema")
@dataclass(frozen=True)
class SweepReportConfig:
    """Draw a sweep: a self-contained page and a picture, in its directory.

    Args:
        root: the sweep's directory.
    """

    root: str = MISSING


def main(config: SweepReportConfig, resolved: dict[str, Any]) -> int:
    root = Path(config.root)
    try:
        record = json.loads((root / FILE).read_text())
    except FileNotFoundError as error:
        raise NoSweepError(f"{root} holds no sweep: it has no {FILE}. Give the `root` of one.") from error
    charts.picture(record, root / PLOT)
    write_atomically(root / PAGE, render(record, root))
    print(f"the sweep is drawn in {(root / PAGE).resolve().as_uri()} and {PLOT}")
    return 0


def render(record: dict[str, Any], root: Path) -> str:
    """The whole page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": number, "share": share, "time": duration, "shown": shown}
    trials = record["trials"]
    experiment = Path(record["experiment"]) if record["experiment"] else None
    return environment.get_template("page.html.jinja").render(
        record=record,
        style=STYLE.read_text(),
        command=shlex.join(["python", "-m", *record["identity"]["command"]]),
        best=next((trial for trial in trials if trial["number"] == record["best"]), None),
        keys=charts.keys(record),
        chart=charts.page(record),
        figures=_figures(record),
        experiment=experiment.read_text() if experiment else "",
        use=f"python -m train --config-dir {experiment.parent.parent} experiment={experiment.stem}"
        if experiment
        else "",
        source=str(root / FILE),
    )


def _figures(record: dict[str, Any]) -> dict[str, str]:
    trials = record["trials"]
    ended = {state: sum(trial["state"] == state for trial in trials) for state in ("done", "pruned", "failed", "cut")}
    names = {"done": "to the end", "pruned": "ended early", "failed": "failed", "cut": "not ended"}
    longest = max((trial["steps"] for trial in trials), default=0)
    steps = sum(trial["steps"] for trial in trials)
    figures = {"trials": str(len(trials)), **{names[state]: str(count) for state, count in ended.items() if count}}
    figures["trials' time, added up"] = duration(sum(trial["seconds"] for trial in trials))
    if ended["pruned"] and longest:
        figures["of the steps that all would have taken"] = share(steps / (longest * len(trials)))
    return figures


if __name__ == "__main__":
    entry.run("sweep_report", SweepReportConfig, main)
