"""metrics.jsonl: one JSON object per line, each step once, whatever happened to the process in between."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.registry import register
from data_pipeline.artifact import write_atomically
from train.metrics.base import Run, Sink, Value

FILE = "metrics.jsonl"


@register("logger", "jsonl", package="logger.jsonl")
@dataclass(frozen=True)
class Jsonl:
    """Append every figure to `metrics.jsonl` in the run directory. After a resume the lines of steps that are trained
    again are dropped."""

    def open(self, run: Run) -> Sink:
        file = run.directory / FILE
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
    def __init__(self, file: Path):
        self._stream = open(file, "a", buffering=1)  # noqa: SIM115  closed by close()

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        # JSON has no NaN; a figure that is none is null.
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._stream.write(json.dumps({"step": step, **line}) + "\n")

    def close(self, summary: Mapping[str, Value]) -> None:
        self._stream.close()
