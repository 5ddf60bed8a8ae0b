"""Requests to stop: the scheduler's warning, the operator's Ctrl-C. They are noted, and heeded between two steps."""

import signal
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM: torchrun, kill, Slurm at the end. SIGUSR1, SIGUSR2: Slurm's warning before it (sbatch --signal)."""


class StopSignals(AbstractContextManager["StopSignals"]):
    """Within the block, a stop signal is noted in `received`. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
