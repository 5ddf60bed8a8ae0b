"""metrics.jsonl: one JSON object per line, each step once, whatever happened to the process in between."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.registry import register
from data_pipeline.artifact import write_atomically
from train.metrics.base import Run, Sink, Value

FILE = "metrics.jsonl"
ALERTS_FILE = "alerts.jsonl"


@register("logger", "jsonl", package="logger.jsonl")
@dataclass(frozen=True)
class Jsonl:
    """Append every figure to `metrics.jsonl` in the run directory, every alert to `alerts.jsonl`. After a resume the
    figures of steps that are trained again are dropped; what was alerted did happen, and stays."""

    def open(self, run: Run) -> Sink:
        file = run.directory / FILE
        kept = [line for line in read(file) if _before(line, run.resumed_step)]
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept))
        return _Lines(file, run.directory / ALERTS_FILE)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a torn last line, left by a kill, is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _before(line: Mapping[str, Any], resumed_step: int) -> bool:
    """A checkpoint is written before the validation of its step, so that validation is done again."""
    step = int(line["step"])
    return step < resumed_step or (step == resumed_step and "validation_loss" not in line)


class _Lines:
    def __init__(self, file: Path, alerts: Path):
        self._stream = open(file, "a", buffering=1)  # noqa: SIM115  closed by close()
        self._alerts = alerts

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        # JSON has no NaN; a figure that is none is null.
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._stream.write(json.dumps({"step": step, **line}) + "\n")

    def alert(self, kind: str, text: str) -> None:
        with open(self._alerts, "a") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), "kind": kind, "text": text}) + "\n")

    def close(self, summary: Mapping[str, Value]) -> None:
        self._stream.close()
