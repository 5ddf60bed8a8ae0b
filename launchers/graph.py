"""A model's life as a graph of artifacts: which stages there are, what each needs, how each is called."""

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf.errors import Problem
from conf.registry import register

NAME = re.compile(r"[a-z][a-z0-9_-]*")
PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
KEYWORDS = {"null", "true", "false", "inf", "nan"}


@register("", "lifecycle_stage_schema")
@dataclass  # not frozen: OmegaConf could not merge a YAML into the values of a dict
class StageSpec:
    """One stage: an entry point of ours that writes one artifact into the directory it is given as `run_dir`.

    Args:
        command: the Python module to run, as in `python -m train`.
        needs: configuration key of the command -> the stage whose directory it is set to. `corpus/tokenizer` is a path
            inside that directory; a list sets a list.
        after: stages that must have ended first although no key names them.
        options: Hydra group -> choice, for instance `stage: sft`.
        set: configuration values of the command, nested as in its YAML.
        processes: ranks.
        always: run it also when a stage before it failed.
    """

    command: str = "train"
    needs: dict[str, Any] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    always: bool = False

    def inputs(self) -> list[str]:
        """The stages this one waits for, each once."""
        named = [path.split("/")[0] for _, paths in self._needed() for path in paths]
        return list(dict.fromkeys([*named, *self.after]))

    def call(self, root: Path, name: str) -> list[str]:
        """The command line after `python -m`."""
        needs = {
            key: [str(root / path) for path in paths] if isinstance(self.needs[key], list) else str(root / paths[0])
            for key, paths in self._needed()
        }
        values = dict(flatten(self.set)) | needs | {"run_dir": str(root / name)}
        options = [f"{group}={choice}" for group, choice in self.options.items()]
        return [self.command, *options, *(f"{key}={quoted(value)}" for key, value in values.items())]

    def texts(self) -> list[str]:
        """Every text among its values; some are paths."""
        values = (value if isinstance(value, list) else [value] for _, value in flatten(self.set))
        return sorted({text for parts in values for text in parts if isinstance(text, str) and text})

    def _needed(self) -> Iterator[tuple[str, list[str]]]:
        for key, paths in self.needs.items():
            yield key, [str(path) for path in paths] if isinstance(paths, list) else [str(paths)]


@register("", "lifecycle_schema")
@dataclass(frozen=True)
class LifecycleConfig:
    """Run the stages of a model's life in order, skip what is done, go on with what was cut.

    Args:
        name: the life's name.
        root: directory that holds one directory per stage, `logs/` and `lifecycle.json`.
        stages: name -> what is run; the name is also the stage's directory.
        launcher: who starts processes.
        concurrent: stages that may run at the same time, where the graph allows it.
        restarts: times in a row that a stage is started again, without a new checkpoint in between, after it stopped
            early (exit code 75) or lost a rank (76, or killed by a signal).
        dry_run: check everything and show what would be run, without running it.
    """

    name: str = MISSING
    root: str = "runs/${name}"
    stages: dict[str, StageSpec] = field(default_factory=dict)
    launcher: Any = MISSING
    concurrent: int = 1
    restarts: int = 3
    dry_run: bool = False

    def order(self) -> list[str]:
        """Every stage after what it needs; otherwise as listed.

        Raises:
            graphlib.CycleError: there is none.
        """
        graph = TopologicalSorter({name: stage.inputs() for name, stage in self.stages.items()})
        graph.prepare()
        listed = {name: position for position, name in enumerate(self.stages)}
        order: list[str] = []
        ready: list[str] = []
        while graph.is_active():
            ready = sorted([*ready, *graph.get_ready()], key=lambda name: listed[name])
            order.append(ready.pop(0))
            graph.done(order[-1])
        return order

    def problems(self) -> list[Problem]:
        found = []
        if not self.stages:
            found.append(Problem("stages", "{}", "at least one stage; see conf/lifecycle/demo.yaml"))
        for key in ("concurrent", "restarts"):
            if getattr(self, key) < (least := 1 if key == "concurrent" else 0):
                found.append(Problem(key, getattr(self, key), f"{least} or more"))
        for name, stage in self.stages.items():
            found += self._stage_problems(name, stage)
        found += getattr(self.launcher, "problems", list)()
        if not found:
            try:
                self.order()
            except CycleError as error:
                # graphlib lists each stage before the one that waits for it.
                circle = " needs ".join(reversed(error.args[1]))
                found.append(
                    Problem("stages", circle, "a stage cannot wait for itself; take one `needs` or `after` away")
                )
        return found

    def _stage_problems(self, name: str, stage: StageSpec) -> list[Problem]:
        key = f"stages.{name}"
        found = []
        if not NAME.fullmatch(name) or name == "logs":
            found.append(Problem(key, name, "a directory's name in lower case (a-z, 0-9, _ and -), other than 'logs'"))
        if stage.processes < 1:
            found.append(Problem(f"{key}.processes", stage.processes, "1 or more"))
        if not importable(stage.command):
            fix = "a module of ours, for instance data_pipeline, train or tools.report"
            found.append(Problem(f"{key}.command", stage.command, fix))
        for other in stage.inputs():
            if other not in self.stages:
                near = difflib.get_close_matches(other, self.stages, n=1)
                fix = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(self.stages)}"
                found.append(Problem(f"{key}.needs", other, f"there is no such stage; {fix}"))
        values = {flat for flat, _ in flatten(stage.set)}
        for flat in sorted(values & set(stage.needs)):
            found.append(Problem(f"{key}.set.{flat}", "...", "it is also in `needs`; keep one of them"))
        for keys in (values, set(stage.needs)):
            if "run_dir" in keys:
                found.append(Problem(f"{key}.run_dir", "...", "the lifecycle gives it; set `root` instead"))
        return found


def importable(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and (
            not spec.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__") is not None
        )
    except (ModuleNotFoundError, ValueError):
        return False


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def quoted(value: Any) -> str:
    """A value as the right-hand side of a Hydra override, of the same type when it is read again."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(quoted(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{quoted(item)}" for key, item in value.items()) + "}"
    text = str(value)
    if not isinstance(value, str) or (PLAIN.fullmatch(text) and text.lower() not in KEYWORDS):
        return text
    # Hydra's rule: backslashes count as escapes only in a run that ends at a quote.
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", text)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    return f"'{escaped}'"
