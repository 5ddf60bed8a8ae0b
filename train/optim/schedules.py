"""Learning-rate schedules: a factor for the base rate, as a function of the step alone.

Every schedule warms up linearly over the first W of T steps, so that step s < W has (s + 1) / W and no step has rate 0.
What follows is written over p = (s - W) / (T - W), the share of the rest that is done: in [0, 1).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import Problem
from conf.registry import register

if TYPE_CHECKING:
    from train.config import RunConfig


@dataclass(frozen=True)
class Schedule:
    """Shared by all: the warm-up."""

    warmup: int = 0

    def factor(self, step: int, total: int) -> float:
        """What the base rate is multiplied by.

        Args:
            step: optimizer steps done before this one.
            total: optimizer steps of the run.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after_warmup((step - self.warmup) / max(1, total - self.warmup), step)

    def after_warmup(self, done: float, step: int) -> float:
        """The factor once the warm-up is over; `done` is p."""
        raise NotImplementedError

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range."""
        found = []
        steps = getattr(config.stage, "steps", None)
        if self.warmup < 0:
            found.append(Problem("schedule.warmup", self.warmup, "must be at least 0"))
        elif steps is not None and self.warmup > steps:
            found.append(Problem("schedule.warmup", self.warmup, f"must be at most stage.steps={steps}"))
        for name in ("floor", "decay"):
            value = getattr(self, name, None)
            if value is not None and not 0 <= value <= 1:
                found.append(Problem(f"schedule.{name}", value, "a share, in [0, 1]"))
        return found


@register("schedule", "constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """1 after the warm-up.

    Args:
        warmup: steps of linear warm-up.
    """

    def after_warmup(self, done: float, step: int) -> float:
        return 1.0


@register("schedule", "linear")
@dataclass(frozen=True)
class Linear(Schedule):
    """From 1 down to `floor`, in a straight line.

    Args:
        warmup: steps of linear warm-up.
        floor: factor at the end, in [0, 1].
    """

    floor: float = 0.0

    def after_warmup(self, done: float, step: int) -> float:
        return self.floor + (1 - self.floor) * (1 - done)


@register("schedule", "cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 down to `floor` (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts).

    Args:
        warmup: steps of linear warm-up.
        floor: factor at the end, in [0, 1].
    """

    floor: float = 0.1

    def after_warmup(self, done: float, step: int) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


@register("schedule", "wsd")
@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Constant, then down over the last part of the run (MiniCPM: Hu et al. 2024, arXiv:2404.06395) as 1 - sqrt (Hägele
    et al. 2024, arXiv:2405.18392): the run can be prolonged from any step before the decay.

    Args:
        warmup: steps of linear warm-up.
        decay: share of the steps after the warm-up that decay, in [0, 1].
        floor: factor at the end, in [0, 1].
    """

    decay: float = 0.2
    floor: float = 0.0

    def after_warmup(self, done: float, step: int) -> float:
        if done <= 1 - self.decay:
            return 1.0
        return self.floor + (1 - self.floor) * (1 - math.sqrt((done - (1 - self.decay)) / self.decay))


@register("schedule", "inverse_sqrt")
@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """sqrt(W / s) after W steps of warm-up (Vaswani et al. 2017, arXiv:1706.03762, section 5.3): needs no end.

    Args:
        warmup: steps of linear warm-up.
    """

    def after_warmup(self, done: float, step: int) -> float:
        return math.sqrt(max(1, self.warmup) / (step + 1))
