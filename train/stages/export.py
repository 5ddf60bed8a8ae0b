"""Hand a model on: only after its gate, and in a form that others load."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem
from conf.registry import register
from train.export.base import Exporter
from train.export.gate import judge
from train.export.source import Source
from train.stages.base import DONE, Stage
from train.stages.derived import deriving

if TYPE_CHECKING:
    from train.config import RunConfig

MODEL = "model"


@register("stage", "export")
@dataclass(frozen=True)
class Export(Stage):
    """Write the model of `init_from` as `export` says, if `export.evaluation` passed its gate.

    Args:
        kind: what the artifact is called.
    """

    kind: str = "export"

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """What is missing, and what is wrong with the exporter's settings."""
        exporter: Exporter = config.export
        found = exporter.problems(config, world_size)
        if not config.init_from:
            found.append(Problem("init_from", "''", "the run or Hugging Face directory whose model is exported"))
        if not exporter.evaluation and not exporter.force:
            fix = "the directory that stage=evaluate made for this model; or set export.force=true"
            found.append(Problem("export.evaluation", "''", fix))
        if world_size > 1:
            found.append(Problem("WORLD_SIZE", world_size, "one process is enough: start it without torchrun"))
        return found

    def run(self, config: "RunConfig", resolved: dict[str, Any]) -> int:
        """Judge, write, publish.

        Raises:
            GateError: the gate failed, or the evaluation is of another model.
            LongrunError: the model cannot be read or written; see `Source.read` and the exporter's `write`.
        """
        exporter: Exporter = config.export
        source = Source.read(config.init_from)
        verdict = judge(exporter.evaluation, source, exporter.force)
        inputs = {"model": source.artifact, "evaluation": verdict.evaluation}
        settings = {key: value for key, value in asdict(exporter).items() if key != "evaluation"}
        recipe = {"exporter": type(exporter).__name__, **settings, "model_fingerprint": source.fingerprint}
        made_from = {name: artifact for name, artifact in inputs.items() if artifact}
        with deriving(config.run_dir, self.kind, recipe, made_from) as draft:
            if draft is None:
                return DONE
            directory = Path(config.run_dir) / MODEL
            shutil.rmtree(directory, ignore_errors=True)  # of an export that was cut
            directory.mkdir()
            exporter.write(directory, source, verdict)
            draft.facts = {
                "gate": verdict.facts(exporter.force),
                "source": str(source.path.resolve()),
                "tokenizer": source.tokenizer.fingerprint,
            }
            size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            draft.metrics = {"bytes": size, "weight_files": len(list(directory.glob("*.safetensors")))}
            artifact = draft.publish(f"{MODEL}/**/*")
        forced = "" if verdict.passed else ", FORCED: " + "; ".join(verdict.reasons)
        print(f"{config.run_dir} is done: {artifact.kind} {artifact.id}, {size / 1e6:,.1f} MB{forced}", flush=True)
        return DONE
