"""The live console: one line that follows the run on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.registry import register
from train.metrics.base import Run, Sink, Value


@register("logger", "console", package="logger.console")
@dataclass(frozen=True)
class Console:
    """Show step, loss, learning rate, gradient norm, throughput, MFU, memory and time left.

    Args:
        every_s: least seconds between two plain lines; validations and the first and last step are always shown.
    """

    every_s: float = 2.0

    def open(self, run: Run) -> Sink:
        return _Live(run) if sys.stdout.isatty() else _Plain(run, self.every_s)


def describe(values: Mapping[str, Value]) -> list[str]:
    """The figures of a training step, in reading order, with units."""
    shown = []
    for name, form in FORMS.items():
        if isinstance(value := values.get(name), float | int):
            shown.append(form(float(value)))
    return shown


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def quantity(value: float) -> str:
    """Three digits and a prefix: 12.3k."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}"


FORMS = {
    "loss": lambda v: f"loss {v:.4f}",
    "lr": lambda v: f"lr {v:.2e}",
    "grad_norm": lambda v: f"norm {v:.3g}",
    "accuracy": lambda v: f"acc {v:.3f}",
    "margin": lambda v: f"margin {v:.3f}",
    "tokens_per_s": lambda v: f"{quantity(v)} tok/s",
    "mfu": lambda v: f"MFU {v:.1%}",
    "memory_bytes": lambda v: f"{v / 2**30:.2f} GiB",
    "eta_s": lambda v: f"left {duration(v)}",
}


def _validation(step: int, steps: int, values: Mapping[str, Value]) -> str:
    figures = "  ".join(f"{n} {v:.4f}" for n, v in values.items() if isinstance(v, float) and not n.endswith("_s"))
    return f"step {step}/{steps}  {figures}"


class _Plain:
    def __init__(self, run: Run, every_s: float):
        self._run = run
        self._every_s = every_s
        self._last = -every_s

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        if "validation_loss" in values:
            print(_validation(step, self._run.steps, values), flush=True)
        elif time.monotonic() - self._last >= self._every_s or step == self._run.steps or "skipped" in values:
            self._last = time.monotonic()
            skipped = ["SKIPPED: spike" if values.get("spike") else "SKIPPED"] if "skipped" in values else []
            print(f"step {step}/{self._run.steps}  " + "  ".join(describe(values) + skipped), flush=True)

    def alert(self, kind: str, text: str) -> None:
        print(f"ALERT {kind}: {text}", flush=True)

    def close(self, summary: Mapping[str, Value]) -> None:
        pass


class _Live:
    def __init__(self, run: Run):
        from rich.progress import BarColumn, Progress, TextColumn

        self._run = run
        self._progress: Any = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
        )
        self._task = self._progress.add_task(run.name, total=run.steps, completed=run.resumed_step, figures="")
        self._progress.start()

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        if "validation_loss" in values or "skipped" in values:
            self._progress.console.print(_validation(step, self._run.steps, values))
        else:
            self._progress.update(self._task, completed=step, figures="  ".join(describe(values)))

    def alert(self, kind: str, text: str) -> None:
        self._progress.console.print(f"ALERT {kind}: {text}", style="bold red", markup=False)

    def close(self, summary: Mapping[str, Value]) -> None:
        self._progress.stop()
