"""The values that a sweep tries, written as Hydra writes its sweeps (`log` is added), in `space` or in the command:

optim.lr: log(1e-4, 1e-2)                any number in between, evenly in the logarithm
optim.weight_decay: interval(0, 0.1)     any number in between
model.layers: int(interval(2, 8))        any whole number, 2 and 8 included; int(log(1, 64)) too
stage.global_batch: range(16, 65, 16)    16, 32, 48, 64
optim: adamw, muon                       these, here the options of a group
optim.betas: [[0.9, 0.95], [0.9, 0.99]]  the values of a list
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.errors import Problem
from launchers.graph import flatten, quoted

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from optuna import Trial

SYNTAX = "log(low, high), interval(low, high), int(...) of these, range(start, stop, step), or a list: [a, b]"
MOST_CORNERS = 16


@dataclass(frozen=True)
class Values:
    """Where the values of one key come from.

    Args:
        ends: the lower and the upper end of a range or interval; none of a list.
        listed: all values, in order; none of an interval. Those of a list are texts, as at the right of an override.
        log: an interval is sampled evenly in its logarithm.
    """

    ends: tuple[Any, Any] | None = None
    listed: list[Any] | None = None
    log: bool = False

    def suggest(self, trial: "Trial", key: str) -> Any:
        """What Optuna's sampler gives the key in this trial."""
        if self.ends is None:
            return trial.suggest_categorical(key, self.listed or [])
        low, high = self.ends
        step = self.listed[1] - self.listed[0] if self.listed else None
        if isinstance(low, int):
            return trial.suggest_int(key, low, high, step=step or 1, log=self.log)
        return trial.suggest_float(key, low, high, step=step, log=self.log)

    def grid(self, points: int) -> list[Any]:
        """All values; of an interval so many, evenly, its ends among them."""
        if self.listed is not None:
            return self.listed
        assert self.ends is not None
        low, high = self.ends
        shares = [i / (points - 1) for i in range(points)]
        between = [low * (high / low) ** s if self.log else low + (high - low) * s for s in shares[1:-1]]
        if isinstance(low, int):
            between = [round(value) for value in between]
        return list(dict.fromkeys([low, *between, high]))

    def extremes(self) -> list[Any]:
        return list(self.ends) if self.ends else list(self.listed or [])


Space = dict[str, Values]


def problems(space: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with each key's values."""
    found = [] if space else [Problem("space", "{}", f"at least one key with the values to try: {SYNTAX}")]
    for key, values in flatten(space):
        try:
            _values(key, values)
        except ValueError as error:
            found.append(Problem(f"space.{key}", values, str(error)))
    return found


def swept(overrides: Sequence[str]) -> dict[str, str]:
    """Those that give a key more than one value, as in `optim.lr=log(1e-4, 1e-2)`: key -> its values."""
    found = {}
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            several = _parse(key, text).is_sweep_override()
        except ValueError:
            several = True  # what is wrong with it is told with the others
        if several:
            found[key] = text
    return found


def read(space: Mapping[str, Any]) -> Space:
    """Key -> where its values come from."""
    return {key: _values(key, values) for key, values in flatten(space)}


def settings(params: Mapping[str, Any]) -> list[str]:
    """The overrides that give a trial its values."""
    return [f"{key}={value}" for key, value in params.items()]


def corners(space: Space) -> Iterator[dict[str, Any]]:
    """The ends of every interval and every value of a list: all combinations where they are few, else one key at a time
    beside the first values of the others."""
    ends = {key: values.extremes() for key, values in space.items()}
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        yield from (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values()))
        return
    first = {key: values[0] for key, values in ends.items()}
    yield first
    for key, others in ends.items():
        yield from (first | {key: value} for value in others[1:])


def _values(key: str, values: Any) -> Values:
    """
    Raises:
        ValueError: says what values would do.
    """
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    if isinstance(values, list | tuple):
        return Values(listed=_distinct([quoted(value) for value in values]))
    parsed = _parse(key, str(values)).value()
    if isinstance(parsed, ChoiceSweep):
        return Values(listed=_distinct([_text(value) for value in parsed.list]))
    if isinstance(parsed, RangeSweep):
        numbers = list(parsed.range()) if parsed.step else []
        if not all(isinstance(number, int) for number in numbers):
            numbers = [float(number) for number in numbers]
        if len(numbers) < 2:
            raise ValueError("two values or more, the end left out: range(16, 65, 16) is 16, 32, 48, 64")
        return Values(ends=(min(numbers), max(numbers)), listed=sorted(numbers))
    if not isinstance(parsed, IntervalSweep):
        raise ValueError(f"one value is nothing to try; {SYNTAX}")
    low, high, log = parsed.start, parsed.end, "log" in parsed.tags
    if low is None or high is None or low >= high:
        raise ValueError("its lower end must be below its upper end")
    if log and low <= 0:
        raise ValueError("there is no logarithm of what is not above 0; give a lower end above 0, or interval(...)")
    return Values(ends=(low, high), log=log)


def _distinct(texts: list[str]) -> list[str]:
    if len(texts) < 2:
        raise ValueError(f"one value is nothing to try; {SYNTAX}")
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise ValueError(f"{', '.join(twice)} more than once; give each value once")
    return texts


def _parse(key: str, text: str) -> "Override":
    """An override in Hydra's grammar, to which `log(low, high)` is added."""
    from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
    from hydra.core.override_parser.types import IntervalSweep
    from hydra.errors import HydraException

    def log(low: int | float, high: int | float) -> IntervalSweep:
        return IntervalSweep(start=float(low), end=float(high), tags={"log"})

    functions = create_functions()
    functions.register(name="log", func=log)
    try:
        return OverridesParser(functions=functions).parse_override(f"{key}={text}")
    except HydraException as error:
        raise ValueError(f"{str(error).splitlines()[0]}; {SYNTAX}") from error


def _text(value: Any) -> str:
    from hydra.core.override_parser.types import QuotedString

    return quoted(value.text if isinstance(value, QuotedString) else value)
