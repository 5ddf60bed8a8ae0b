"""The gate: thresholds that a model's figures must hold before it is handed on."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from conf.errors import ConfigError, Problem


@dataclass(frozen=True)
class Check:
    """One threshold. Figures have names such as `accuracy`, `accuracy/sort` or `bits_per_byte`; with `@NAME` they are
    those of the baseline of that name.

    Args:
        metric: name of the figure.
        minus: name of a figure that is taken off it, for instance `accuracy@pretrain`; empty for none.
        min: the least that passes; null for no bound.
        max: the most that passes; null for no bound.
    """

    metric: str = ""
    minus: str = ""
    min: float | None = None
    max: float | None = None

    @property
    def label(self) -> str:
        return f"{self.metric} - {self.minus}" if self.minus else self.metric

    @property
    def threshold(self) -> str:
        bounds = [f"at least {self.min:g}"] if self.min is not None else []
        return " and ".join(bounds + ([f"at most {self.max:g}"] if self.max is not None else []))

    def judged(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """The check as it stands in results.json. A figure that is no number passes nothing."""
        found = figures.get(self.metric, math.nan) - (figures.get(self.minus, math.nan) if self.minus else 0.0)
        above = self.min is None or found >= self.min
        below = self.max is None or found <= self.max
        return {"metric": self.label, "found": found, "threshold": self.threshold, "passed": above and below}


def check_problems(gate: Mapping[str, Any]) -> list[Problem]:
    """What can be wrong with checks as they are configured, known before anything is measured."""
    found = []
    keys = {field.name for field in fields(Check)}
    for name, settings in gate.items():
        if not isinstance(settings, Mapping) or not settings.keys() <= keys:
            fix = f"keys of a check are {', '.join(sorted(keys))}"
            found.append(Problem(f"eval.gate.{name}", settings, fix))
            continue
        check = Check(**settings)
        if not all(isinstance(bound, int | float | None) for bound in (check.min, check.max)):
            found.append(Problem(f"eval.gate.{name}", settings, "min and max are numbers"))
        if not check.metric:
            found.append(Problem(f"eval.gate.{name}.metric", "''", "the figure to judge, for instance accuracy"))
        if check.min is None and check.max is None:
            found.append(Problem(f"eval.gate.{name}", check.label, "a bound: set min, max or both"))
    return found


def check_names(gate: Mapping[str, Check], measured: list[str], benchmarks: Sequence[str] = ()) -> None:
    """Refuse a gate that asks for what will not be measured.

    Args:
        gate: the checks.
        measured: names of the figures.
        benchmarks: tasks of lm-eval that will be run; what figures they have is known only then.

    Raises:
        ConfigError: names every such figure, the nearest that exists, and all that do.
    """
    problems = []
    for name, check in gate.items():
        for key in ("metric", "minus"):
            metric = getattr(check, key)
            if metric.startswith(tuple(f"benchmark/{task}/" for task in benchmarks)):
                continue
            if metric and metric not in measured:
                near = difflib.get_close_matches(metric, measured, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                fix = f"{hint}measured are {', '.join(measured)}"
                problems.append(Problem(f"eval.gate.{name}.{key}", metric, fix))
    if problems:
        raise ConfigError(problems)


def judge(gate: Mapping[str, Check], figures: Mapping[str, float]) -> dict[str, Any] | None:
    """{"passed", "checks"} of a gate; None without one."""
    if not gate:
        return None
    checks = [{"name": name, **check.judged(figures)} for name, check in gate.items()]
    return {"passed": all(check["passed"] for check in checks), "checks": checks}
