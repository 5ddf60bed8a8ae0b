"""From the command line to a validated configuration object; from an error to one readable message."""

import dataclasses
import difflib
import inspect
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import secrets
from conf.errors import ConfigError, LongrunError, Problem
from conf.registry import OPTIONS

C = TypeVar("C")

PLUGINS = str(Path(__file__).parents[1] / "launchers" / "plugins")
"""Holds our part of the package in which Hydra looks for launchers of multiruns."""


def run(config_name: str, schema: type[C], main: Callable[[C, dict[str, Any]], int]) -> None:
    """Run an entry point: compose `conf/<config_name>.yaml`, check it, call `main(config, resolved)`.

    Args:
        config_name: primary configuration, a YAML file in this folder.
        schema: its dataclass; `schema.problems()`, where it exists, lists what is wrong before anything starts.
        main: given the typed configuration and its plain, resolved form; returns the exit code.
    """
    try:
        secrets.check_arguments(sys.argv[1:])
    except ConfigError as error:
        raise SystemExit(tell(error)) from None
    with secrets.unprinted():
        _run(config_name, schema, main)


def _run(config_name: str, schema: type[C], main: Callable[[C, dict[str, Any]], int]) -> None:
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        print(_help(schema))  # Hydra takes ten seconds more to list the groups
        return
    sys.path.append(PLUGINS)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # composition errors reach `explain` below

    composed = False

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)
    def task(node: DictConfig) -> None:
        nonlocal composed
        composed = True
        # Told here: an exception that reached Hydra would be announced a second time in its own words.
        try:
            code = main(typed(node, schema), OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
        except LongrunError as error:
            code = tell(error)
        if code:
            raise SystemExit(code)

    try:
        task()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error, schema)}", file=sys.stderr)
        raise SystemExit(1) from None
    except ValueError as error:
        if composed:
            raise
        # Hydra's own, for `optim=3`: it does not name the key.
        fix = "A group takes the name of one of its options, as in optim=muon; values go to keys in it: optim.lr=0.01."
        print(f"error: {error}\n{fix}", file=sys.stderr)
        raise SystemExit(1) from None


def tell(error: LongrunError) -> int:
    """Print the message once; returns the exit code."""
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if "SLURM_STEP_NUM_TASKS" in os.environ else None)
    if not isinstance(error, ConfigError):
        print(f"[rank {rank}] error: {error}" if rank else f"error: {error}", file=sys.stderr)
    elif rank is None or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)) == "0":
        # A machine's ranks all found the same; another machine may not have.
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def typed(node: DictConfig, schema: type[C]) -> C:
    """The composed configuration as an instance of its dataclass, checked.

    Raises:
        ConfigError: lists every problem, or every secret.
    """
    if found := secrets.problems(OmegaConf.to_container(node, resolve=True)):  # type: ignore[arg-type]
        raise ConfigError(found)
    config = OmegaConf.to_object(node)
    assert isinstance(config, schema), f"the primary configuration does not use the schema {schema.__name__}"
    problems: list[Problem] = config.problems() if hasattr(config, "problems") else []
    if problems:
        raise ConfigError(problems)
    return config


def explain(error: Exception, schema: type) -> str:
    """Hydra's message, with the nearest existing keys where one was misspelt."""
    messages = []
    cause: BaseException | None = error
    while cause is not None:
        if str(cause) not in messages:
            messages.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(messages)
    if match := re.search(r"Key '(\w+)' (?:is )?not in '(\w+)'", text):
        key, owner = match.groups()
        fields = next((_fields(c) for c in [schema, *OPTIONS.values()] if c.__name__ == owner), [])
        near = difflib.get_close_matches(key, fields, n=3, cutoff=0.5)
        text += f"\nDid you mean {' or '.join(near)}?" if near else f"\nKeys there: {', '.join(fields)}."
    return text


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def meanings(cls: type) -> dict[str, str]:
    """Field -> what its class's `Args:` section says of it, inherited classes included."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(owner.__doc__ or ""), re.MULTILINE)
        for name, text in re.findall(
            r"^ {4}(\w+): ((?:.*\n?)(?:^ {8,}.*\n?)*)", section[1] if section else "", re.MULTILINE
        ):
            found[name] = " ".join(text.split())
    return found


def _documented(cls: type) -> str:
    """Two lines per field: its name, type and default; its meaning."""
    meaning = meanings(cls)
    lines = []
    for field in dataclasses.fields(cls):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        kind = getattr(field.type, "__name__", str(field.type))
        lines.append(f"  {field.name}: {kind}{default}\n      {meaning.get(field.name, '')}")
    return "\n".join(lines)


def _help(schema: type) -> str:
    """The help page of an entry point whose root is `schema`."""
    parts = [str(inspect.getdoc(schema)), "", "== Configuration groups ==", *_groups(), ""]
    for (group, name), cls in sorted(OPTIONS.items()):
        if group:
            summary = (inspect.getdoc(cls) or "").split("\n")[0]
            parts += [f"-- {group}={name}: {summary}", _documented(cls)]
    return "\n".join([*parts, "", "Show the composed configuration: --cfg job"])


def _groups() -> list[str]:
    """A line for each group: what there is to choose, of YAML files and of classes."""
    here = Path(__file__).parent
    choices: dict[str, set[str]] = defaultdict(set)
    for file in here.rglob("*.yaml"):
        choices[file.parent.relative_to(here).as_posix()].add(file.stem)
    for group, name in OPTIONS:
        choices[group].add(name)
    return [f"{group}: {', '.join(sorted(choices[group]))}" for group in sorted(choices) if group not in ("", ".")]
