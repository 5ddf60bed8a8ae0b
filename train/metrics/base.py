"""Where figures go: any number of sinks at once, none of which can stop the run, or hold it up."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from conf.secrets import redactor
from data_pipeline.artifact import Artifact
from train.metrics.apart import Apart

Value = float | int | str

ALERTS = ("spike", "stall", "gate", "fault", "straggler")
"""What a person is told of at once, beside the figures."""

OPEN_S = 30.0
"""Seconds that a run waits, before it begins, for what sinks have to say of themselves: a refused key, no server."""


@dataclass(frozen=True)
class Run:
    """What a sink may want to know about the run it records.

    Args:
        name: the run's name.
        directory: the run directory.
        config: the resolved configuration.
        steps: optimizer steps planned.
        resumed_step: the step it goes on from; 0 for a new run.
        inputs: the artifacts it reads, by name.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    steps: int
    resumed_step: int
    inputs: Mapping[str, Artifact] = field(default_factory=dict)


class Sink(Protocol):
    """An open record of one run. It may have any of these as well:

    alert(kind, text): something that people should hear of; one of ALERTS, and a sentence.
    system(step, values): figures of the machine, called `system/...`.
    artifact(artifact): what the run has made.
    """

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """One line of figures: of a training step, or (with `validation_loss` among them) of a validation after it."""
        ...

    def close(self, summary: Mapping[str, Value]) -> None:
        """The end, with the run's final figures; empty when it was cut short."""
        ...


class Logger(Protocol):
    """An option of the group `logger`: a frozen dataclass that opens a sink. One with `apart = True` waits for a
    network or a disk of its own, and gets a thread of its own: all calls to its sink come from there."""

    def open(self, run: Run) -> Sink: ...


class Metrics:
    """All sinks of a run. One that raises is named in a warning and dropped, one that hangs is left behind; training
    goes on.

    Args:
        loggers: name -> option of the group `logger`.
        run: what is recorded.
        close_s: seconds that sinks have at the end to take what is left.
    """

    def __init__(self, loggers: Mapping[str, Logger], run: Run, close_s: float = 30.0):
        self._sinks: dict[str, Any] = {}
        self._close_s = close_s
        self._step = run.resumed_step
        self._redacted = redactor()
        for name, logger in loggers.items():
            with self._spared(name):
                apart = getattr(logger, "apart", False)
                self._sinks[name] = Apart(name, logger, run, self._drop) if apart else logger.open(run)
        deadline = time.monotonic() + OPEN_S
        for sink in self._apart().values():
            sink.opened.wait(max(0.0, deadline - time.monotonic()))

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self._step = step
        self._tell("log", step, values)

    def alert(self, kind: str, text: str) -> None:
        """Tell every sink that can pass it on; from any thread.

        Args:
            kind: one of ALERTS.
            text: what happened, in a sentence.
        """
        assert kind in ALERTS, kind
        self._tell("alert", kind, self._redacted(text))

    def system(self, values: Mapping[str, float]) -> None:
        """Figures of the machine; from any thread."""
        self._tell("system", self._step, values)

    def artifact(self, artifact: Artifact) -> None:
        """What the run has made."""
        self._tell("artifact", artifact)

    def close(self, summary: Mapping[str, Value]) -> None:
        """End all sinks, within `close_s`."""
        self._tell("close", summary)
        deadline = time.monotonic() + self._close_s
        for name, sink in self._apart().items():
            if not sink.ended.wait(max(0.0, deadline - time.monotonic())):
                said = f"logger {name} did not end within {self._close_s:g} s and is left behind"
                warnings.warn(f"{said}: its last figures may be missing there", stacklevel=2)
        self._sinks = {}

    def _tell(self, what: str, *given: Any) -> None:
        for name, sink in list(self._sinks.items()):
            if hasattr(sink, what):
                with self._spared(name):
                    getattr(sink, what)(*given)

    def _apart(self) -> dict[str, Apart]:
        return {name: sink for name, sink in self._sinks.items() if isinstance(sink, Apart)}

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  a tracker's failure, whatever it is, must not cost the run
            self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._sinks.pop(name, None)
        said = self._redacted(f"logger {name} failed and is left out from here on: {error!r}")
        warnings.warn(said, stacklevel=5)


def numbers(values: Mapping[str, Value]) -> Iterable[tuple[str, float]]:
    """The figures that can be plotted."""
    return ((name, float(value)) for name, value in values.items() if not isinstance(value, str))


def grouped(values: Mapping[str, Value]) -> dict[str, Value]:
    """The figures of a line under the names that trackers show them by: `train/loss`, `validation/loss`."""
    group = "validation" if "validation_loss" in values else "train"
    return {f"{group}/{name.removeprefix('validation_')}": value for name, value in values.items()}
