"""The training loop. It knows nothing of the model, of layouts, or of where the figures go."""

import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from parallel.engine import Engine, StepResult
from train.checkpoint.checkpoints import Checkpoints
from train.guard import Patrol
from train.monitor import Monitor
from train.objectives.base import MicroBatch, Objective
from train.progress import Progress
from train.signals import StopSignals
from train.throughput import Clock

if TYPE_CHECKING:
    from data_pipeline.loader import Loader


class Schedule(Protocol):
    """An option of the group `schedule`: the learning-rate factor as a function of the step."""

    def factor(self, step: int, total: int) -> float: ...


class End(Enum):
    """Why the loop ended."""

    FINISHED = auto()
    NO_GAIN = auto()
    """`patience` validations without a better loss."""
    ASKED = auto()
    """A stop signal; a checkpoint is written."""


@dataclass
class Validation:
    """The loss on held-out samples: the same ones every time.

    Args:
        batches: this rank's micro-batches.
        every: steps between validations; 0 never in the loop.
        patience: validations without a better loss after which the run ends; 0 never.
        ema: validate the averaged weights.
        bits_per_byte: bits per byte of text for each nat per token; 0 where that has no meaning.
    """

    engine: Engine
    objective: Objective
    batches: list[MicroBatch]
    progress: Progress
    monitor: Monitor
    every: int
    patience: int
    ema: bool
    bits_per_byte: float = 0.0
    last: tuple[int, dict[str, float]] = (-1, {})
    """The step of the newest validation, and what it found."""

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.progress.validations_without_gain

    def run(self, step: int) -> dict[str, float]:
        """Validate the weights as they are after `step` steps, unless that is done already."""
        if self.last[0] == step:
            return self.last[1]
        with self.monitor.clock.on("evaluation"):
            self.monitor.flush()
            start = time.perf_counter()
            result: StepResult = self.engine.evaluate(self.batches, self.objective, ema=self.ema)
            loss = float(result.loss)
            found = {"validation_loss": loss}
            if self.bits_per_byte:
                found["bits_per_byte"] = loss * self.bits_per_byte
            found |= {f"validation_{name}": float(value) for name, value in result.metrics.items()}
            self.progress.count_validation(step, loss)
            self.monitor.metrics.log(step, {**found, "validation_s": time.perf_counter() - start})
        self.last = (step, found)
        return found


@dataclass
class Loop:
    """Everything a step needs."""

    engine: Engine
    objective: Objective
    loader: "Loader"
    schedule: Schedule
    learning_rate: float
    steps: int
    progress: Progress
    monitor: Monitor
    patrol: Patrol
    checkpoints: Checkpoints
    validation: Validation
    clock: Clock
    signals: StopSignals
    earlier_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.earlier_s = self.progress.seconds

    def run(self) -> End:
        """Train from `progress.step` to the last step, or until asked to stop.

        Raises:
            FaultError: the state, a loss or a gradient norm is not as it should be.
            CheckpointError: too many saves in a row failed.
        """
        self.validate(self.progress.step)  # a kill may have come between a save and its validation
        while self.progress.step < self.steps and not self.validation.exhausted and not self.monitor.stop:
            step = self.progress.step
            with self.clock.on("data"):
                batch = self.loader.batch(step)  # a pure function of the step
            factor = self.schedule.factor(step, self.steps)
            with self.clock.step(step):
                result = self.engine.train_step(batch, self.objective, factor)  # all ranks update or all skip
            self.progress.step = step = step + 1
            self.monitor.record(step, result, batch, factor * self.learning_rate, self.signals.received is not None)
            due = self.checkpoints.due(step)
            with self.clock.on("guard"):
                self.patrol.check(step, wait=due)  # what is gone back to must be good
            if due:
                self.save()  # returns once the tensors are copied
            self.validate(step)
        self._save_last()
        return self._end()

    def validate(self, step: int) -> None:
        if self.validation.due(step):
            self.validation.run(step)

    def save(self) -> None:
        with self.clock.on("checkpoint"):
            self.monitor.flush()
            self.progress.seconds = self.earlier_s + self.clock.total_s
            self.checkpoints.save(self.progress.step, self.engine.state(), self.progress.state())

    def _save_last(self) -> None:
        with self.clock.on("guard"):
            self.patrol.check(self.progress.step, wait=True)
        self.save()
        while not self._saved():
            self.save()

    def _saved(self) -> bool:
        with self.clock.on("checkpoint"):
            return self.checkpoints.wait()

    def _end(self) -> End:
        if self.validation.exhausted:
            return End.NO_GAIN
        return End.FINISHED if self.progress.step == self.steps else End.ASKED
