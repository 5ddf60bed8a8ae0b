"""The configuration of `python -m launchers.sweep`."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import launchers
import launchers.sweep.search
import launchers.sweep.stopping
from conf.errors import Problem
from conf.registry import discover, register
from launchers.graph import importable
from launchers.sweep import best, space

for package in (launchers, launchers.sweep.search, launchers.sweep.stopping):
    discover(package)

NAME = re.compile(r"[a-z][a-z0-9_-]*")


@register("", "sweep_schema")
@dataclass(frozen=True)
class SweepConfig:
    """Run a command many times with other settings, and keep the best as an experiment.

    Args:
        name: the sweep's name.
        root: directory that holds one run directory per trial (000, 001, ...), `logs/`, the journal and the results.
        command: what each trial runs, as after `python -m`; on the command line it follows a `--`. A setting with more
            than one value is tried with each: log(low, high), interval(low, high), int(...) of these,
            range(start, stop, step), or a list a,b.
        space: further keys -> values to try.
        search: who proposes values.
        stopping: which trials are ended early.
        figure: what is compared: a figure of the trial's metrics.jsonl or of its manifest (`shares.data` is one inside
            another).
        maximise: whether more of it is better.
        trials: how many are tried; of a grid, the most it may have.
        concurrent: trials that run at the same time.
        processes: ranks of each trial.
        launcher: who starts processes.
        max_failures: trials that may fail until the sweep is given up; at least 1.
        restarts: times in a row that a trial is started again after it stopped early (exit code 75) or was lost (76),
            without a new checkpoint in between.
        seed: of the proposals.
        best: the experiment file that is written; made anew when a better trial ends.
        dry_run: check everything and show the trials so far, without running any.
    """

    name: str = "sweep"
    root: str = "runs/sweeps/${name}"
    command: list[str] = field(default_factory=list)
    space: Any = None
    search: Any = MISSING
    stopping: Any = MISSING
    figure: str = "validation_loss"
    maximise: bool = False
    trials: int = 20
    concurrent: int = 1
    processes: int = 1
    launcher: Any = MISSING
    max_failures: int = 5
    restarts: int = 3
    seed: int = 0
    best: str = "${root}/experiment/${name}_best.yaml"
    dry_run: bool = False

    @cached_property
    def values(self) -> dict[str, Any]:
        """Every key that is tried, of `space` and of the command -> its values."""
        return dict(space.flatten(self.space or {})) | space.swept(self.command[1:])

    @cached_property
    def fixed(self) -> list[str]:
        """The command without the keys that are tried."""
        swept = space.swept(self.command[1:])
        return [text for text in self.command if text.partition("=")[0] not in swept]

    def problems(self) -> list[Problem]:
        found = []
        if not NAME.fullmatch(self.name):
            found.append(Problem("name", self.name, "a directory's name in lower case (a-z, 0-9, _ and -)"))
        for key in ("trials", "concurrent", "processes", "max_failures", "restarts"):
            if getattr(self, key) < (least := 0 if key == "restarts" else 1):
                found.append(Problem(key, getattr(self, key), f"{least} or more"))
        found += self._command_problems()
        wrong = space.problems(self.values)
        found += wrong or self.search.problems(space.read(self.values), self.trials)
        found += self.stopping.problems()
        found += getattr(self.launcher, "problems", list)()
        return found + best.problems(Path(self.best))

    def _command_problems(self) -> list[Problem]:
        module, *overrides = self.command or [""]
        if "=" in module or not importable(module):
            fix = "a module of ours first, then its settings: ... -- train experiment=demo stage.steps=200"
            return [Problem("command", " ".join(self.command), fix)]
        found = []
        for text in overrides:
            key = text.lstrip("+").partition("=")[0]
            if text.startswith("~"):
                found.append(Problem("command", text, "an experiment cannot take a key away: give it null"))
            elif "=" not in text:
                found.append(Problem("command", text, "a setting, as in stage.steps=200"))
            elif key in dict(space.flatten(self.space or {})):
                found.append(Problem(f"space.{key}", "...", "the command sets it too; keep one of them"))
        if any(text.startswith("run_dir=") for text in overrides) or "run_dir" in self.values:
            found.append(Problem("command", "run_dir", "each trial has a directory of its own; set `root` instead"))
        return found
