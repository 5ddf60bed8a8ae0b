"""Every combination, once."""

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import Problem
from conf.registry import register
from launchers.sweep.search.base import Search
from launchers.sweep.space import Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


@register("search", "grid")
@dataclass(frozen=True)
class Grid(Search):
    """Try every combination of values, in order; the last key changes fastest.

    Args:
        points: values taken of an interval, its ends among them, evenly, or evenly in its logarithm; at least 2.
    """

    points: int = 5

    def problems(self, space: Space, trials: int) -> list[Problem]:
        if self.points < 2:
            return [Problem("search.points", self.points, "2 (both ends of an interval) or more")]
        if (size := self._size(space)) > trials:
            fix = f"the grid has {size} combinations: give trials={size}, fewer values or points, or search=random"
            return [Problem("trials", trials, fix)]
        return []

    def trials(self, space: Space, trials: int) -> int:
        return self._size(space)

    def sampler(self, space: Space, number: int, seed: int) -> "BaseSampler":
        from optuna.exceptions import ExperimentalWarning
        from optuna.samplers import PartialFixedSampler, RandomSampler

        grids = [values.grid(self.points) for values in space.values()]
        combination = next(itertools.islice(itertools.product(*grids), number, None))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return PartialFixedSampler(dict(zip(space, combination, strict=True)), RandomSampler(seed))

    def _size(self, space: Space) -> int:
        return math.prod(len(values.grid(self.points)) for values in space.values())
