"""A lifecycle's directory as data: every stage with its manifest, its command, its curve; what is not there is None."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.artifact import MANIFEST, Artifact, ArtifactError
from launchers.lifecycle import BOOK
from train import goodput
from train.metrics.jsonl import FILE as METRICS
from train.metrics.jsonl import read as read_metrics

KIND = "report"


@dataclass
class StageView:
    """One stage as the page shows it.

    Args:
        name: of the stage, and of its directory.
        directory: where its artifact is, or would be.
        artifact: its manifest; None where the stage has not ended well.
        note: why it has not, where that is known.
        command: how the lifecycle started it; empty without a lifecycle.
        wall_s: seconds the lifecycle waited for it, with the start of its processes.
        inputs: stages it was made from -> whether each is still the one that was used.
        lines: its metrics, one per logged step, in order.
        account: where its wall time went, over its restarts; None where it kept no record.
        config: the configuration it was run with.
    """

    name: str
    directory: Path
    artifact: Artifact | None = None
    note: str = ""
    command: str = ""
    processes: int = 1
    wall_s: float = 0.0
    inputs: dict[str, bool] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    account: goodput.Account | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time it took to make; 0 where it is not there."""
        return self.wall_s or self.artifact.duration_s if self.artifact else 0.0

    @property
    def kind(self) -> str:
        return self.artifact.kind if self.artifact else ""

    @property
    def metrics(self) -> dict[str, Any]:
        return self.artifact.metrics if self.artifact else {}

    @property
    def facts(self) -> dict[str, Any]:
        return self.artifact.facts if self.artifact else {}

    @property
    def trained(self) -> bool:
        return bool(self.lines)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one figure, where it was logged as a finite number."""
        points = [(line["step"], line[key]) for line in self.lines if isinstance(line.get(key), int | float)]
        finite = [(float(x), float(y)) for x, y in points if abs(y) < float("inf")]
        return [x for x, _ in finite], [y for _, y in finite]


@dataclass
class Life:
    """All stages, in the order of the lifecycle."""

    root: Path
    stages: list[StageView]

    def __iter__(self) -> Iterator[StageView]:
        return iter(self.stages)

    def of_kind(self, *kinds: str) -> list[StageView]:
        return [stage for stage in self.stages if stage.kind in kinds]

    def last(self, *kinds: str) -> StageView | None:
        """The latest stage of these kinds."""
        return next(reversed(self.of_kind(*kinds)), None)

    @property
    def trained(self) -> list[StageView]:
        return [stage for stage in self.stages if stage.trained]


def read(root: Path) -> Life:
    """Everything below `root` that is, or was meant to be, an artifact."""
    book = read_json(root / BOOK)
    known: Mapping[str, Any] = book.get("stages", {})
    found = sorted(file.parent.name for file in root.glob(f"*/{MANIFEST}") if ".stale-" not in file.parent.name)
    stages = [_stage(root, name, known.get(name, {})) for name in [*known, *(n for n in found if n not in known)]]
    for stage in stages:
        stage.wall_s = book.get("seconds", {}).get(stage.name, 0.0)
        if not stage.artifact:
            stage.note = stage.note or book.get("failed", {}).get(stage.name, "")
    stages = [stage for stage in stages if stage.kind != KIND and "tools.report" not in stage.command]
    if not known:
        stages.sort(key=lambda stage: stage.artifact.started_s if stage.artifact else 0)
    _link(stages)
    return Life(root, stages)


def _stage(root: Path, name: str, known: Mapping[str, Any]) -> StageView:
    directory = root / name
    view = StageView(name, directory, command=known.get("command", ""), processes=known.get("processes", 1))
    try:
        view.artifact = Artifact.read(directory)
        view.note = "; ".join(view.artifact.damage(contents=False))
    except ArtifactError as error:
        if (directory / MANIFEST).exists():
            view.note = str(error)
    view.lines = read_metrics(directory / METRICS)
    if attempts := goodput.read(directory):
        view.account = goodput.account(attempts)
    if (directory / "config.yaml").exists():
        view.config = yaml.safe_load((directory / "config.yaml").read_text()) or {}
    elif view.artifact:
        view.config = view.artifact.config
    view.inputs = dict.fromkeys(known.get("inputs", []), True)
    return view


def _link(stages: list[StageView]) -> None:
    """Where there is a manifest, it knows better than the lifecycle what the stage was made from."""
    places = {stage.directory.resolve(): stage for stage in stages}
    for stage in stages:
        if stage.artifact:
            stage.inputs = {}
            for link in stage.artifact.inputs.values():
                if other := places.get((stage.directory / link["path"]).resolve()):
                    same = other.artifact is not None and other.artifact.id == link["id"]
                    stage.inputs[other.name] = stage.inputs.get(other.name, True) and same


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; an empty one where it is missing or torn."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def results_of(stage: StageView | None) -> dict[str, Any]:
    """The evaluation's results.json; empty where there is none."""
    return read_json(stage.directory / "results.json") if stage else {}
