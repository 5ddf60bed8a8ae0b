"""Measure a model and judge it by its gate. The artifact is written either way: export reads the verdict."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import Artifact, sha256_of, write_atomically
from parallel import distributed
from train.evaluate.load import name_of
from train.export.source import Source
from train.metrics.base import Metrics, Run
from train.stages.base import DONE, Stage
from train.stages.derived import deriving

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.evaluate.standard import Standard

RESULTS = "results.json"
SAMPLES = "samples.txt"
PATHS = ("text", "tasks", "code", "baselines", "reference")
"""Settings that name inputs, whose content is compared instead."""
ELSEWHERE = ("isolation",)
"""Settings that change where something is run, and no result."""


@register("stage", "evaluate")
@dataclass(frozen=True)
class Evaluate(Stage):
    """Measure the model of `init_from` as `eval` says.

    Args:
        kind: what the artifact is called.
    """

    kind: str = "evaluation"

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """What is missing, and what is wrong with `eval`."""
        found = [] if config.eval is None else config.eval.problems(config, world_size)
        if config.eval is None:
            found.append(Problem("eval", None, "what to measure, for instance eval=standard"))
        if not config.init_from:
            found.append(Problem("init_from", "''", "the run or Hugging Face directory whose model is measured"))
        if world_size > 1:
            found.append(Problem("WORLD_SIZE", world_size, "one process is enough: start it without torchrun"))
        return found

    def run(self, config: "RunConfig", resolved: dict[str, Any]) -> int:
        """Measure, judge, publish. A failed gate is a result, not an error.

        Raises:
            ConfigError: the gate asks for figures that are not measured.
            LongrunError: models or data cannot be read.
        """
        standard: Standard = config.eval
        sources = {"model": Source.read(config.init_from)}
        # With a prefix: a baseline may lie in a directory called `model`, and is not the one that is judged.
        sources |= {f"baseline {name_of(path)}": Source.read(path) for path in standard.baselines}
        if standard.reference:
            sources["reference"] = Source.read(standard.reference)
        inputs = standard.inputs() | {name: source.artifact for name, source in sources.items() if source.artifact}
        recipe = {
            "eval": {key: value for key, value in asdict(standard).items() if key not in PATHS + ELSEWHERE},
            "code": sha256_of(Path(standard.code)) if standard.code else "",
            "models": {name: source.fingerprint for name, source in sources.items()},
        }
        with deriving(config.run_dir, self.kind, recipe, inputs) as draft, ExitStack() as stack:
            if draft is None:
                return DONE
            world = distributed.start()
            stack.callback(distributed.stop)
            results = standard.measure(config.init_from, world.device)
            directory = Path(config.run_dir)
            write_atomically(directory / RESULTS, json.dumps(results, indent=1) + "\n")
            write_atomically(directory / SAMPLES, as_text(results["samples"]))
            draft.metrics = {
                **results["models"][results["model"]],
                "gate": results["gate"] and results["gate"]["passed"],
            }
            draft.facts = {"model_fingerprint": sources["model"].fingerprint, "device": world.device.type}
            artifact = draft.publish(RESULTS, SAMPLES)
        _tell(Run(config.name, directory, resolved, 0, 0, inputs), config, artifact, results["gate"])
        print(f"{config.run_dir} is done: {self.kind} {artifact.id}\n{verdict(results['gate'])}", flush=True)
        return DONE


def _tell(run: Run, config: "RunConfig", artifact: Artifact, gate: Mapping[str, Any] | None) -> None:
    """Figures and verdict for those who watch."""
    metrics = Metrics(config.logger, run, config.watching.close_s)
    if gate and not gate["passed"]:
        failed = "; ".join(_found(check) for check in gate["checks"] if not check["passed"])
        metrics.alert("gate", f"{config.init_from} did not pass its gate: {failed}")
    metrics.artifact(artifact)
    metrics.close({name: value for name, value in artifact.metrics.items() if isinstance(value, int | float)})


def as_text(samples: list[Mapping[str, Any]]) -> str:
    """Questions and every model's answers, for people."""
    parts = []
    for sample in samples:
        answers = "".join(f"  {name}: {answer!r}\n" for name, answer in sample["answers"].items())
        parts.append(f"[{sample['task']}] {sample['prompt']}\n  expected: {sample['expected']!r}\n{answers}")
    return "\n".join(parts)


def verdict(gate: Mapping[str, Any] | None) -> str:
    """One line per check."""
    if gate is None:
        return "no gate was given: this model cannot be exported without export.force=true"
    lines = [f"gate {'passed' if gate['passed'] else 'FAILED'}"]
    for check in gate["checks"]:
        mark = "ok  " if check["passed"] else "FAIL"
        lines.append(f"  {mark} {_found(check)}")
    return "\n".join(lines)


def _found(check: Mapping[str, Any]) -> str:
    return f"{check['metric']} = {check['found']:.4g}, {check['threshold']} was asked for"
