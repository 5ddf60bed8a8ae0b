"""The best trial as an experiment file: `python -m train --config-dir <root> experiment=<name>_best` is that trial."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.errors import Problem
from data_pipeline.artifact import write_atomically

HEADER = "# @package _global_\n# The best of the sweep "


def problems(file: Path) -> list[Problem]:
    """What keeps the file from being written."""
    if file.suffix != ".yaml" or file.parent.name != "experiment":
        return [Problem("best", file, "a .yaml file in a folder called experiment, as in conf/experiment/mine.yaml")]
    if file.exists() and not file.read_text().startswith(HEADER):
        return [Problem("best", file, "a new file, or one that a sweep wrote: this one would be written over")]
    return []


def write(file: Path, about: str, settings: Sequence[str], groups: Sequence[str]) -> None:
    """Write the experiment that these settings are.

    Args:
        about: the sweep's name, and what its best trial reached.
        settings: overrides, as on the command line.
        groups: the configuration groups that there are; a setting of one chooses an option.
    """
    defaults, values = translate(settings, groups)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create({"defaults": [*defaults, "_self_"]})) + "\n"
    if values:
        text += OmegaConf.to_yaml(OmegaConf.create(values))
    write_atomically(file, f"{HEADER}{about}\n{text}")


def translate(settings: Sequence[str], groups: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Overrides as the defaults list and the values of a file: later ones win, as on the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    bases: list[Any] = []
    options: dict[str, Any] = {}
    values = OmegaConf.create({})
    for override in OverridesParser.create().parse_overrides(list(settings)):
        key, value = override.key_or_group, override.value()
        if key == "experiment":
            bases = list(value) if isinstance(value, list) else [value]
        elif key in groups:
            place = f"/{key}@{override.package}" if override.package else f"/{key}"
            options[place if override.is_add() else f"override {place}"] = None if override.is_delete() else value
        else:
            OmegaConf.update(values, key, value, merge=True, force_add=True)
    adding = [{place: option} for place, option in options.items() if not place.startswith("override ")]
    overriding = [{place: option} for place, option in options.items() if place.startswith("override ")]
    return [*bases, *adding, *overriding], OmegaConf.to_container(values)  # type: ignore[return-value]
