"""The configuration of `python -m train`: one typed tree, checked before anything starts."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

import data_pipeline
import parallel.engines
import train.evaluate
import train.export
import train.metrics
import train.models
import train.objectives
import train.optim
import train.preflight
import train.stages
from conf.errors import Problem
from conf.registry import discover, register
from parallel.distributed import place
from parallel.layout import Layout
from train.failures import Failures
from train.guard import Guard
from train.preflight.limits import Preflight
from train.watching import Watching

RESUME = ("auto", "never", "must")

register("parallel", "layout")(Layout)
register("failures", "failures")(Failures)
register("guard", "guard")(Guard)
register("watching", "watching")(Watching)
for package in (
    data_pipeline,
    parallel.engines,
    train.models,
    train.objectives,
    train.optim,
    train.preflight,
    train.stages,
    train.evaluate,
    train.export,
    train.metrics,
):
    discover(package)


@register("", "run_schema")
@dataclass(frozen=True)
class RunConfig:
    """One stage of a model's life, from its inputs to an artifact.

    Args:
        stage: what is run: pretrain, sft, dpo, evaluate, export, verify, preflight.
        model: the architecture of a model that starts from random weights.
        data: what it is trained or evaluated on.
        parallel: the layout; see the group `parallel`.
        engine: who owns the parallel model.
        optim: the optimizer.
        schedule: learning-rate factor over the run.
        objective: the loss.
        eval: what is measured, and the gate.
        export: the format that is handed on.
        guard: what is done about silent faults; see the group `guard`.
        logger: where metrics go; several at once.
        preflight: what is measured before the first step, and asked of each machine.
        failures: when other ranks are given up, and what is tried again.
        watching: what is looked at beside the run, and when an alert is raised.
        init_from: Hugging Face directory, or artifact holding one, to start from; empty for random weights.
        seed: of initialisation, data order, dropout and sampling.
        name: the run's name.
        run_dir: the directory that becomes the artifact.
        resume: "auto" goes on from the newest checkpoint in run_dir that verifies, or begins; "never" refuses a
            directory that holds any; "must" one that holds none, as where a file system is not mounted.
        dry_run: check everything, say what would run, and start nothing.
    """

    stage: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    parallel: Layout = field(default_factory=Layout)
    engine: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING
    objective: Any = MISSING
    eval: Any = None
    export: Any = None
    guard: Guard = field(default_factory=Guard)
    logger: dict[str, Any] = field(default_factory=dict)
    preflight: Preflight = field(default_factory=Preflight)
    failures: Failures = field(default_factory=Failures)
    watching: Watching = field(default_factory=Watching)
    init_from: str = ""
    seed: int = 0
    name: str = "${stage.kind}"
    run_dir: str = "runs/${name}"
    resume: str = "auto"
    dry_run: bool = False

    def problems(self) -> list[Problem]:
        """Everything wrong with the configuration, found without a process group."""
        found = [] if self.resume in RESUME else [Problem("resume", self.resume, f"one of {', '.join(RESUME)}")]
        # A dry run judges the layout by itself: the machine it is meant for is elsewhere.
        world_size = self.parallel.world_size if self.dry_run else place().size
        parts = ("stage", "model", "data", "engine", "optim", "schedule", "objective")
        for part in (getattr(self, name) for name in (*parts, "guard", "preflight", "failures", "watching")):
            if hasattr(part, "problems"):
                found += part.problems(self, world_size)
        return found
