"""Independent draws: the baseline that is hard to beat in few dimensions (Bergstra and Bengio 2012)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.registry import register
from launchers.sweep.search.base import Search
from launchers.sweep.space import Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


@register("search", "random")
@dataclass(frozen=True)
class Random(Search):
    """Draw every value by itself."""

    def sampler(self, space: Space, number: int, seed: int) -> "BaseSampler":
        from optuna.samplers import RandomSampler

        return RandomSampler(seed)
