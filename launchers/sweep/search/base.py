"""What a search does: it proposes the values of one trial."""

from typing import TYPE_CHECKING

from conf.errors import Problem
from launchers.sweep.space import Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class Search:
    """Subclasses are frozen dataclasses registered with `@register("search", name)`."""

    independent: bool = True
    """Whether a trial's values do not depend on how earlier trials ended, so that all can be started at once."""

    def problems(self, space: Space, trials: int) -> list[Problem]:
        return []

    def trials(self, space: Space, trials: int) -> int:
        """How many of so many trials there is something to try for."""
        return trials

    def sampler(self, space: Space, number: int, seed: int) -> "BaseSampler":
        """Who is asked for trial `number`: a new one for each, so that a sweep that was killed proposes what it would
        have proposed.

        Args:
            seed: of this trial alone.
        """
        raise NotImplementedError
