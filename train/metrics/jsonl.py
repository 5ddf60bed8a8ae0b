"""metrics.jsonl: one JSON object per line, each step once, whatever happened to the process in between."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from conf.registry import register
from data_pipeline.artifact import write_atomically
from train.metrics.base import Run, Sink, Value

FILE = "metrics.jsonl"
ALERTS_FILE = "alerts.jsonl"
SYSTEM_FILE = "system.jsonl"


@register("logger", "jsonl", package="logger.jsonl")
@dataclass(frozen=True)
class Jsonl:
    """Append every figure to `metrics.jsonl` in the run directory, alerts to `alerts.jsonl` and figures of the machine
    to `system.jsonl`. After a resume the figures of steps that are trained again are dropped; the others did happen,
    and stay."""

    def open(self, run: Run) -> Sink:
        file = run.directory / FILE
        if file.exists():
            kept = [line for line in read(file) if _before(line, run.resumed_step)]
            write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept))
        return _Lines(file)


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
    """Each file is there once it has a line."""

    def __init__(self, file: Path):
        self._file = file
        self._stream: TextIO | None = None

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        # JSON has no NaN; a figure that is none is null.
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        if self._stream is None:
            self._stream = open(self._file, "a", buffering=1)  # noqa: SIM115  closed by close()
        self._stream.write(json.dumps({"step": step, **line}) + "\n")

    def system(self, step: int, values: Mapping[str, float]) -> None:
        self._append(SYSTEM_FILE, {"step": step, **values})

    def alert(self, kind: str, text: str) -> None:
        self._append(ALERTS_FILE, {"kind": kind, "text": text})

    def _append(self, name: str, line: Mapping[str, Value]) -> None:
        with open(self._file.with_name(name), "a") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")

    def close(self, summary: Mapping[str, Value]) -> None:
        if self._stream is not None:
            self._stream.close()
