"""A launcher whose trials are no processes: each look at one lets it take a step. Their loss is a bowl."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.artifact import Draft
from launchers.base import DONE, STOPPED_EARLY, Ended, Output

STEPS = 8


def loss(lr: float, decay: float, step: int) -> float:
    """Lowest at lr 1e-2 and decay 0; falls with the steps."""
    return (math.log10(lr) + 2) ** 2 + decay + 1 / step


@dataclass
class Trial:
    directory: Path
    values: dict[str, str]
    output: Output
    asked: bool = False
    killed: bool = False

    def poll(self) -> Ended | None:
        step = self._done() + 1
        behaviour = self.values.get("behaviour", "well")
        if self.killed:
            return Ended(137, "it was killed by SIGKILL")
        if self.asked or (behaviour == "preempted" and step == 4 and not (self.directory / "once").exists()):
            (self.directory / "once").touch()
            return Ended(STOPPED_EARLY)
        if behaviour == "fails" or (behaviour == "fails once" and not (self.directory / "mended").exists()):
            self.output(0, "why it failed")
            return Ended(1, "it exited with code 1")
        with open(self.directory / "metrics.jsonl", "a") as stream:
            stream.write(json.dumps({"step": step, "loss": 9.0}) + "\n")
            value = (
                None if behaviour == "diverges" else loss(float(self.values["lr"]), float(self.values["decay"]), step)
            )
            stream.write(json.dumps({"step": step, "validation_loss": value}) + "\n")
        if step < STEPS:
            return None
        draft = Draft(self.directory, "scripted", self.values, {})
        draft.metrics = {"validation_loss": value if value is not None else math.nan, "shares": {"data": 0.25}}
        draft.publish()
        return Ended(DONE)

    def stop(self) -> None:
        self.asked = True

    def kill(self) -> None:
        self.killed = True

    def _done(self) -> int:
        file = self.directory / "metrics.jsonl"
        return len(file.read_text().splitlines()) // 2 if file.exists() else 0


class Fast(Trial):
    """Is done before anybody looks."""

    def poll(self) -> Ended | None:
        while (ended := super().poll()) is None:
            pass
        return ended


@dataclass
class Scripted:
    """Notes the command of every start."""

    started: list[list[str]] = field(default_factory=list)
    live: list[Trial] = field(default_factory=list)

    def start(self, command: Sequence[str], processes: int, output: Output) -> Trial:
        self.started.append(list(command))
        values = dict(text.split("=", 1) for text in command[1:])
        directory = Path(values.pop("run_dir"))
        directory.mkdir(parents=True, exist_ok=True)
        trial = Trial(directory, values, output)
        self.live.append(trial)
        return trial
