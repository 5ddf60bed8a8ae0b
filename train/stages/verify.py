"""Nothing is handed on unchecked: an export is loaded again, by others' code, and compared with its source."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import Artifact, write_atomically
from train.export.huggingface import DTYPES
from train.export.verification import Check, Reference, VerificationError, compare
from train.models import hf
from train.stages.base import DONE, Stage
from train.stages.derived import deriving

if TYPE_CHECKING:
    from train.config import RunConfig

REPORT = "verify.json"


@register("stage", "verify")
@dataclass(frozen=True)
class Verify(Stage):
    """Load the export of `init_from` with transformers in a fresh process and compare with the model it was made from.

    Args:
        kind: what the artifact is called; it exists only if every check passed.
        tolerance: largest difference between two log-probabilities computed in fp32, in nats.
        max_tokens: tokens of each greedy continuation.
    """

    kind: str = "verification"
    tolerance: float = 1e-4
    max_tokens: int = 32

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """What is missing or out of range."""
        found = []
        if not config.init_from:
            found.append(Problem("init_from", "''", "the directory that stage=export made"))
        if not self.tolerance > 0:
            found.append(Problem("stage.tolerance", self.tolerance, "must be above 0; 1e-4 is what fp32 gives"))
        if self.max_tokens < 1:
            found.append(Problem("stage.max_tokens", self.max_tokens, "must be at least 1"))
        if world_size > 1:
            found.append(Problem("WORLD_SIZE", world_size, "one process is enough: start it without torchrun"))
        return found

    def run(self, config: "RunConfig", resolved: dict[str, Any]) -> int:
        """Compare, write verify.json, and publish if all checks passed.

        Raises:
            VerificationError: names what differs; or the model that was exported is no longer there.
            ArtifactError: no finished export, or its files are not those that were recorded.
        """
        export = Artifact.read(config.init_from, kind="export")
        recipe = {"tolerance": self.tolerance, "max_tokens": self.max_tokens}
        with deriving(config.run_dir, self.kind, recipe, {"export": export}) as draft:
            if draft is None:
                return DONE
            export.verify()
            directory = hf.model_directory(config.init_from)
            dtype = str(json.loads((directory / hf.CONFIG).read_text())["dtype"])
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            reference = Reference.load(_source(export), DTYPES[dtype], device)
            checks = compare(reference, directory, dtype, self.max_tokens, self.tolerance)
            report = {
                "export": {"path": config.init_from, "id": export.id},
                "passed": all(check.passed for check in checks),
                "checks": [{**asdict(check), "passed": check.passed} for check in checks],
            }
            write_atomically(Path(config.run_dir) / REPORT, json.dumps(report, indent=1) + "\n")
            print("\n".join(_line(check) for check in checks), flush=True)
            if not report["passed"]:
                failed = "\n  ".join(_line(check) for check in checks if not check.passed)
                raise VerificationError(
                    f"{config.init_from} does not do what its model did; it must not be handed on:\n  {failed}\n"
                    f"All checks are in {Path(config.run_dir) / REPORT}. Export it again; if it fails again, the "
                    "installed transformers reads this architecture differently: report both versions."
                )
            draft.metrics = {check.name: check.found for check in checks}
            draft.publish(REPORT)
        print(f"{config.run_dir} is done: {config.init_from} is verified", flush=True)
        return DONE


def _source(export: Artifact) -> Path:
    """The Hugging Face directory of the model that was exported.

    Raises:
        VerificationError: it is gone, or another by now.
    """
    link = export.inputs.get("model")
    path = export.path / link["path"] if link else Path(export.facts["source"])
    if not path.is_dir() or (link and Artifact.read(path).id != link["id"]):
        raise VerificationError(
            f"The model that {export.path} was made from is no longer at {path}: there is nothing to compare with. "
            "Put it back, or export again from where it is."
        )
    return hf.model_directory(path)


def _line(check: Check) -> str:
    mark = "passed" if check.passed else "FAILED"
    return f"{mark}  {check.name}: {check.found:.3g} (at most {check.threshold:.3g}). {check.detail}".rstrip()
