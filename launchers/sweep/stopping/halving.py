"""Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import Problem
from conf.registry import register
from launchers.sweep.stopping.base import Stop

if TYPE_CHECKING:
    from optuna.pruners import BasePruner


@register("stopping", "halving")
@dataclass(frozen=True)
class Halving(Stop):
    """Compare at step `first`, then at steps `keep_one_in` times as far: of the trials that have come to such a step,
    the best one in `keep_one_in` goes on.

    Args:
        first: step of the first comparison.
        keep_one_in: at least 2.
    """

    first: int = 1
    keep_one_in: int = 3

    def problems(self) -> list[Problem]:
        found = []
        if self.first < 1:
            found.append(Problem("stopping.first", self.first, "a step, 1 or more"))
        if self.keep_one_in < 2:
            found.append(Problem("stopping.keep_one_in", self.keep_one_in, "2 (halving) or more; 3 is usual"))
        return found

    def pruner(self) -> "BasePruner":
        from optuna.pruners import SuccessiveHalvingPruner

        return SuccessiveHalvingPruner(min_resource=self.first, reduction_factor=self.keep_one_in)
