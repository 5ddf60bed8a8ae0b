"""What a trial reports: lines of its `metrics.jsonl` while it runs, its manifest once it is done."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.artifact import Artifact

FILE = "metrics.jsonl"


@dataclass
class Figures:
    """Follows one figure of a run directory as it grows.

    Args:
        directory: the trial's run directory.
        figure: its name.
        steps: the newest step of any line.
        names: every figure seen so far.
    """

    directory: Path
    figure: str
    steps: int = 0
    names: set[str] = field(default_factory=set)
    _file: int = 0
    _read: int = 0

    def new(self) -> list[tuple[int, float]]:
        """Step and value of each line that has come since the last call. A run that goes on from a checkpoint writes
        its file anew, and so its lines come again."""
        try:
            with open(self.directory / FILE, "rb") as stream:
                about = os.fstat(stream.fileno())
                if about.st_ino != self._file or about.st_size < self._read:
                    self._file, self._read = about.st_ino, 0
                stream.seek(self._read)
                text = stream.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self._read += len(whole)
        found = []
        for line in map(json.loads, whole.splitlines()):
            self.steps = int(line.get("step", self.steps))
            self.names |= line.keys() - {"step"}
            if self.figure in line:
                found.append((self.steps, number(line[self.figure])))
        return found

    def final(self, last: float | None) -> float | None:
        """The finished trial's figure: its manifest's, else the `last` of its lines; None if it has neither.

        Raises:
            ArtifactError: there is no manifest.
        """
        metrics = Artifact.read(self.directory).metrics
        self.names |= metrics.keys()
        value: Any = metrics
        for part in [self.figure] if self.figure in metrics else self.figure.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return number(value) if isinstance(value, int | float) else last


def number(value: Any) -> float:
    """A figure that is none is null in JSON lines: not a number."""
    return float(value) if isinstance(value, int | float) else math.nan
