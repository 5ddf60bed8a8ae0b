"""What a person sees of a lifecycle: one prefixed line per line a stage prints, a table before and after."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.artifact import Artifact

COLOURS = {
    "done": "green",
    "resumed": "green",
    "skipped": "dim",
    "failed": "bold red",
    "cut": "yellow",
    "not started": "dim",
    "to run": "cyan",
}


@dataclass
class Row:
    """One stage in the table.

    Args:
        stage: its name.
        state: a key of `COLOURS`.
        seconds: wall time the stage took when it was last run, or None.
        note: its headline number, or why it is not there.
    """

    stage: str
    state: str
    seconds: float | None = None
    note: str = ""


class Display:
    """Writes to the console from any thread."""

    def __init__(self, stages: Iterable[str]):
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True)
        self.width = max(map(len, stages), default=0) + 2
        self.lock = threading.Lock()

    def line(self, stage: str, rank: int, text: str) -> None:
        """What a rank of a stage printed."""
        from rich.text import Text

        name = stage if rank == 0 else f"{stage}.{rank}"
        with self.lock:
            self.console.print(Text.assemble((f"{name:>{self.width}} │ ", "cyan"), Text.from_ansi(text)))

    def say(self, text: str, style: str = "bold") -> None:
        """A line of the lifecycle itself."""
        from rich.text import Text

        with self.lock:
            self.console.print(Text(text, style=style))

    def table(self, title: str, rows: Iterable[Row]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("stage", style="bold")
        table.add_column("state")
        table.add_column("time", justify="right")
        table.add_column("")
        for row in rows:
            time = "" if row.seconds is None else duration(row.seconds)
            table.add_row(row.stage, Text(row.state, style=COLOURS[row.state]), time, Text(row.note))
        with self.lock:
            self.console.print()
            self.console.print(table)
            self.console.print()


def duration(seconds: float) -> str:
    """For instance 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def headline(artifact: Artifact) -> str:
    """The number or two that a person looks for first, among those that the stages of its kind record."""
    metrics = artifact.metrics
    wanted = {
        "training tokens": _find(metrics, "splits", "train", "tokens"),
        "training records": _find(metrics, "records", "train"),
        "steps": metrics.get("steps"),
        "validation loss": metrics.get("validation_loss"),
        "bits per byte": metrics.get("bits_per_byte"),
        "accuracy": metrics.get("accuracy"),
        "gate passed": metrics.get("gate", _find(artifact.facts, "gate", "passed")),
        "bytes": metrics.get("bytes"),
        "largest difference": metrics.get("log-probabilities, fp32"),
    }
    return ", ".join(f"{name} {_shown(value)}" for name, value in wanted.items() if isinstance(value, int | float))


def _find(metrics: Mapping[str, Any], *keys: str) -> Any:
    value: Any = metrics
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _shown(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
