"""Median stopping (Golovin et al. 2017, Google Vizier, section 3.2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import Problem
from conf.registry import register
from launchers.sweep.stopping.base import Stop

if TYPE_CHECKING:
    from optuna.pruners import BasePruner


@register("stopping", "median")
@dataclass(frozen=True)
class Median(Stop):
    """End a trial whose best value so far is worse than the median of what the finished ones had reported at that step.

    Args:
        startup: trials that must have finished before the first is ended.
        first: step of the first comparison.
    """

    startup: int = 5
    first: int = 0

    def problems(self) -> list[Problem]:
        found = []
        if self.startup < 1:
            found.append(Problem("stopping.startup", self.startup, "1 or more; 5 is usual"))
        if self.first < 0:
            found.append(Problem("stopping.first", self.first, "a step, 0 or more"))
        return found

    def pruner(self) -> "BasePruner":
        from optuna.pruners import MedianPruner

        return MedianPruner(n_startup_trials=self.startup, n_warmup_steps=self.first)
