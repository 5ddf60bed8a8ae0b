"""What a stopping rule does: it compares a trial under way with the others."""

from typing import TYPE_CHECKING

from conf.errors import Problem

if TYPE_CHECKING:
    from optuna.pruners import BasePruner


class Stop:
    """Subclasses are frozen dataclasses registered with `@register("stopping", name)`."""

    def problems(self) -> list[Problem]:
        return []

    def pruner(self) -> "BasePruner":
        """As Optuna has it; asked after each value that a trial reports."""
        raise NotImplementedError
