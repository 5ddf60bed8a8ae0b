"""Where figures go: any number of sinks at once, none of which can stop the run."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Value = float | int | str

ALERTS = ("spike", "stall", "gate", "fault", "straggler")
"""What a person is told of at once, beside the figures."""


@dataclass(frozen=True)
class Run:
    """What a sink may want to know about the run it records.

    Args:
        name: the run's name.
        directory: the run directory.
        config: the resolved configuration.
        steps: optimizer steps planned.
        resumed_step: the step it goes on from; 0 for a new run.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    steps: int
    resumed_step: int


class Sink(Protocol):
    """An open record of one run. One that can tell people also has `alert(kind, text)`, called from any thread."""

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """One line of figures: of a training step, or (with `validation_loss` among them) of a validation after it."""
        ...

    def close(self, summary: Mapping[str, Value]) -> None:
        """The end, with the run's final figures; empty when it was cut short."""
        ...


class Logger(Protocol):
    """An option of the group `logger`: a frozen dataclass that opens a sink."""

    def open(self, run: Run) -> Sink: ...


class Metrics:
    """All sinks of a run. One that raises is named in a warning and dropped; training goes on."""

    def __init__(self, loggers: Mapping[str, Logger], run: Run):
        self._sinks: dict[str, Sink] = {}
        for name, logger in loggers.items():
            with self._spared(name):
                self._sinks[name] = logger.open(run)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._spared(name):
                sink.log(step, values)

    def alert(self, kind: str, text: str) -> None:
        """Tell every sink that can pass it on; from any thread.

        Args:
            kind: one of ALERTS.
            text: what happened, in a sentence.
        """
        assert kind in ALERTS, kind
        for name, sink in list(self._sinks.items()):
            if hasattr(sink, "alert"):
                with self._spared(name):
                    sink.alert(kind, text)

    def close(self, summary: Mapping[str, Value]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._spared(name):
                sink.close(summary)
        self._sinks = {}

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  a tracker's failure, whatever it is, must not cost the run
            self._sinks.pop(name, None)
            warnings.warn(f"logger {name} failed and is left out from here on: {error!r}", stacklevel=4)


def numbers(values: Mapping[str, Value]) -> Iterable[tuple[str, float]]:
    """The figures that can be plotted."""
    return ((name, float(value)) for name, value in values.items() if not isinstance(value, str))
