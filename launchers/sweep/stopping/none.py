"""Every trial runs to its end."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.registry import register
from launchers.sweep.stopping.base import Stop

if TYPE_CHECKING:
    from optuna.pruners import BasePruner


@register("stopping", "none")
@dataclass(frozen=True)
class Never(Stop):
    """End no trial early."""

    def pruner(self) -> "BasePruner":
        from optuna.pruners import NopPruner

        return NopPruner()
