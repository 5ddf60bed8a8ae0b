"""Why a checkpoint is not of the model that is to go on with it, in words of the configuration."""

from collections.abc import Iterable, Mapping

MODEL = "model."
"""What parameters' names begin with."""


def only(where: str, names: set[str]) -> list[str]:
    """Names that only one side has, in lines; what belongs to a parameter goes without saying."""
    parameters = {name.removeprefix(MODEL) for name in names if name.startswith(MODEL)}
    moments, averages, others = set(), set(), set()
    for name in names:
        kind, _, rest = name.partition(".")
        parameter, _, moment = rest.rpartition(".")
        if kind == "optimizer" and parameter not in parameters:
            moments.add(moment)
        elif kind == "ema" and rest not in parameters:
            averages.add(rest)
        elif kind not in ("model", "optimizer", "ema"):
            others.add(name)
    lines = [f"parameters only {where}: {', '.join(_some(parameters))}"] if parameters else []
    if moments:
        lines.append(f"moments only {where}, of another optimizer: {', '.join(sorted(moments))}")
    if averages:
        lines.append(f"averaged weights only {where} (stage.ema): {', '.join(_some(averages))}")
    return [*lines, f"only {where}: {', '.join(_some(others))}"] if others else lines


def reshaped(there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names that have another shape on either side, in lines."""
    return [
        f"{name}: {list(there[name])} there, {list(shape)} here"
        for name, shape in here.items()
        if name in there and there[name] != shape
    ]


def shown(lines: list[str]) -> list[str]:
    """Of shapes that differ, a few: a parameter's, where there are any, since its moments have the same."""
    return _some([line for line in lines if line.startswith(MODEL)] or lines)


def _some(names: Iterable[str], count: int = 4) -> list[str]:
    ordered = sorted(names)
    return ordered if len(ordered) <= count else [*ordered[:count], f"and {len(ordered) - count} more"]
