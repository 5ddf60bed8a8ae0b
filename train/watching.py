"""What is looked at beside the run: the machine, and whether steps still end."""

import statistics
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from conf.errors import Problem
from train.metrics.base import Metrics
from train.metrics.system import Machine
from train.throughput import Clock

if TYPE_CHECKING:
    from train.config import RunConfig

TICK_S = 1.0
LEAST_STEPS = 3
"""Steps that must have been seen before one can be unusual."""


@dataclass(frozen=True)
class Watching:
    """What a thread of the first rank looks at. None of it changes what is trained.

    Args:
        system_every_s: seconds between two looks at the machine: CPU, memory, disk, network, GPU; 0 does not look.
        stall_times: alert where no step ends for so many times the time of a usual one; 0 does not.
        stall_least_s: seconds that no stall is shorter than.
        close_s: seconds that trackers have at the end of a run to take what is left.
    """

    system_every_s: float = 15.0
    stall_times: float = 10.0
    stall_least_s: float = 60.0
    close_s: float = 30.0

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range."""
        names = ("system_every_s", "stall_times", "stall_least_s", "close_s")
        return [Problem(f"watching.{n}", v, "must be at least 0") for n in names if (v := getattr(self, n)) < 0]


class Watcher(AbstractContextManager["Watcher"]):
    """The thread, from the beginning of the block to its end.

    Args:
        option: what is looked at.
        clock: tells which steps have ended.
        metrics: where figures and alerts go.
        directory: the run directory.
        device: of this rank.
    """

    def __init__(self, option: Watching, clock: Clock, metrics: Metrics, directory: Path, device: torch.device):
        self.option, self.clock, self.metrics = option, clock, metrics
        self.directory, self.device = directory, device
        self._done, self._since_s = -1, 0.0
        self._told = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watching", daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join(TICK_S)

    def _run(self) -> None:
        every_s, machine = self.option.system_every_s, None
        due = time.monotonic() + every_s
        while not self._closing.wait(min(TICK_S, every_s or TICK_S)):
            self.look_for_stall()
            if not every_s or time.monotonic() < due:
                continue
            due += every_s
            try:
                machine = machine or Machine(self.directory, self.device)
                self.metrics.system(machine.look())
            except Exception as error:  # noqa: BLE001  a machine that hides its figures is trained on without them
                print(f"figures of the machine are left out: {error!r}", file=sys.stderr, flush=True)
                every_s = 0.0

    def look_for_stall(self) -> None:
        """Alert, once, where the step after the last one takes far longer than those before it. Time in validations
        does not count."""
        spans = self.clock.spans
        if not self.option.stall_times or not spans:
            return
        marks = list(spans[-1][-32:])
        spent = self.clock.spent()
        now_s = sum(
            spent.get(what, 0.0) for what in ("data", "compute", "communication", "checkpoint", "guard", "profile")
        )
        if marks[-1][0] != self._done:
            self._done, self._since_s, self._told = marks[-1][0], now_s, False
        taken = [(late - early) / (after - before) for (before, early), (after, late) in pairwise(marks)]
        if len(taken) < LEAST_STEPS or self._told:
            return
        usual_s, waited_s = statistics.median(taken), now_s - self._since_s
        if waited_s > max(self.option.stall_least_s, self.option.stall_times * usual_s):
            self._told = True
            self.metrics.alert(
                "stall",
                f"no step has ended for {waited_s:.0f} s after step {self._done}, where a usual one takes "
                f"{usual_s:.2g} s; the loop is in {self.clock.what}",
            )
