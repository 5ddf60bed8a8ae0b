"""Bayesian: the tree-structured Parzen estimator (Bergstra et al. 2011; Watanabe 2023, arXiv:2304.11127)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import Problem
from conf.registry import register
from launchers.sweep.search.base import Search
from launchers.sweep.space import Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


@register("search", "tpe")
@dataclass(frozen=True)
class TPE(Search):
    """Draw where good trials are dense and bad ones are not, all keys together. Trials under way count as bad ones, so
    that several at once spread out; so do trials that failed.

    Args:
        startup: trials that are drawn at random first.
    """

    startup: int = 10

    independent = False

    def problems(self, space: Space, trials: int) -> list[Problem]:
        return [] if self.startup >= 1 else [Problem("search.startup", self.startup, "1 or more; 10 is usual")]

    def sampler(self, space: Space, number: int, seed: int) -> "BaseSampler":
        from optuna.samplers import TPESampler

        return TPESampler(n_startup_trials=self.startup, multivariate=True, constant_liar=True, seed=seed)
