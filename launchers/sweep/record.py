"""What a sweep leaves for people and programs: `sweep.json`, `table.csv`, a table on the console, a page."""

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.errors import OccupiedError
from data_pipeline.artifact import write_atomically
from launchers.display import Display, duration
from launchers.graph import quoted
from launchers.sweep.book import JOURNAL, Book, Outcome
from launchers.sweep.config import SweepConfig

FILE = "sweep.json"
TABLE = "table.csv"
COLOURS = {"done": "green", "pruned": "yellow", "failed": "bold red", "cut": "cyan"}


def identity(config: SweepConfig) -> dict[str, Any]:
    """What must be the same for a sweep to go on."""
    return {
        "command": config.fixed,
        **{f"space.{key}": values for key, values in config.values.items()},
        "search": repr(config.search),
        "seed": config.seed,
        "figure": config.figure,
        "maximise": config.maximise,
    }


def check_same(root: Path, config: SweepConfig) -> None:
    """Refuse to go on with another sweep.

    The figure may be another one as long as no trial has reported it: then the journal is begun anew, in which the
    same values will be proposed for the same directories.

    Raises:
        OccupiedError: names each key that differs, with both values.
    """
    try:
        stored = json.loads((root / FILE).read_text())
    except FileNotFoundError:
        return
    before, now = stored["identity"], identity(config)
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if not differing:
        return
    if {"figure", "maximise"}.issuperset(differing) and all(trial["value"] is None for trial in stored["trials"]):
        (root / JOURNAL).unlink(missing_ok=True)
    else:
        absent = "absent"
        told = [f"{key}: {before.get(key, absent)!r} there, {now.get(key, absent)!r} now" for key in differing]
        raise OccupiedError(
            f"{root} holds another sweep:\n  " + "\n  ".join(told) + "\n"
            "Give these keys their values from there to go on with it, or another `name` to begin anew."
        )


def write(root: Path, config: SweepConfig, book: Book) -> None:
    """What is known by now."""
    outcomes = ranked(book.outcomes(), config.maximise)
    leader = book.best()
    content = {
        "name": config.name,
        "identity": identity(config),
        "stopping": repr(config.stopping),
        "figure": config.figure,
        "maximise": config.maximise,
        "logarithmic": [key for key, values in book.space.items() if values.log],
        "best": leader.number if leader else None,
        "experiment": config.best if Path(config.best).exists() else None,
        "importance": book.importance(),
        "trials": [asdict(outcome) for outcome in outcomes],
    }
    write_atomically(root / FILE, json.dumps(content, indent=1, default=str) + "\n")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", *book.space, config.figure, "state", "steps", "seconds", "failure"])
    for outcome in outcomes:
        values = [outcome.params.get(key) for key in book.space]
        table.writerow(
            [outcome.number, *values, outcome.value, outcome.state, outcome.steps, outcome.seconds, outcome.failure]
        )
    write_atomically(root / TABLE, text.getvalue())


def ranked(outcomes: list[Outcome], maximise: bool) -> list[Outcome]:
    """The finished trials from best to worst, then the others."""
    order = {state: place for place, state in enumerate(COLOURS)}

    def key(outcome: Outcome) -> tuple[int, float, int]:
        value = math.inf if outcome.value is None else -outcome.value if maximise else outcome.value
        return order[outcome.state], value, outcome.number

    return sorted(outcomes, key=key)


def show(display: Display, config: SweepConfig, book: Book) -> None:
    """The table, and where to go from it."""
    from rich.table import Table
    from rich.text import Text

    outcomes = book.outcomes()
    table = Table(title=f"{config.name} in {config.root}", title_justify="left", title_style="bold", box=None)
    for name in ("trial", *book.space, config.figure):
        table.add_column(name, justify="right")
    for name in ("state", "steps", "time", ""):
        table.add_column(name, justify="left" if name == "state" else "right")
    for outcome in ranked(outcomes, config.maximise):
        table.add_row(
            f"{outcome.number:03d}",
            *(shown(outcome.params.get(key)) for key in book.space),
            shown(outcome.value),
            Text(outcome.state, style=COLOURS[outcome.state]),
            str(outcome.steps or ""),
            duration(outcome.seconds),
            outcome.failure.split("\n")[0],
        )
    with display.lock:
        display.console.print()
        display.console.print(table)
        display.console.print()
    if importance := book.importance():
        shares = ", ".join(f"{key} {share:.0%}" for key, share in importance.items())
        display.say(f"What made the difference: {shares}", style="")
    finished = [outcome for outcome in outcomes if outcome.state == "done"]
    if repr(config.stopping) != "Never()" and finished and all(len(outcome.curve) < 2 for outcome in finished):
        display.say(
            f"No trial reported {config.figure} before its end, so none could be ended early: let them report it "
            "more often, as with stage.validate_every.",
            style="yellow",
        )
    if (leader := book.best()) is not None:
        best = Path(config.best)
        display.say(f"The best is trial {leader.number:03d}, {config.figure} {shown(leader.value)}", style="green")
        if best.exists():
            display.say(f"python -m train --config-dir {best.parent.parent} experiment={best.stem}", style="bold cyan")


def drawn(root: Path) -> str:
    """Have page and picture made, by a process because of all that drawing imports; returns what it said."""
    command = [sys.executable, "-m", "tools.sweep_report", f"root={quoted(str(root))}"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout.strip()


def shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
