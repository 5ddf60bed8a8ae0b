"""The gate: a model is handed on only after an evaluation of that very model has passed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import LongrunError
from data_pipeline.artifact import Artifact
from train.export.source import Source

RESULTS = "results.json"


class GateError(LongrunError):
    """The model has not been shown to be good enough."""


@dataclass(frozen=True)
class Verdict:
    """What the evaluation says.

    Args:
        evaluation: its artifact; None where the export was forced without one.
        results: content of its results.json.
        reasons: why the gate is not passed; empty when it is.
    """

    evaluation: Artifact | None = None
    results: dict[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reasons

    def facts(self, force: bool) -> dict[str, Any]:
        """For the manifest."""
        return {"passed": self.passed, "forced": force and not self.passed, "reasons": list(self.reasons)}


def judge(path: str, source: Source, force: bool) -> Verdict:
    """Read the evaluation at `path` and decide whether `source` may be exported.

    Raises:
        GateError: there is none, it is of another model (which `force` does not excuse), or its gate failed.
        ArtifactError: it is no finished evaluation.
    """
    if not path:
        verdict = Verdict(reasons=("no evaluation was given",))
    else:
        artifact = Artifact.read(path, kind="evaluation")
        artifact.verify()
        _check_same_model(artifact, source)
        results = json.loads((Path(path) / RESULTS).read_text())
        verdict = Verdict(artifact, results, tuple(_failures(results.get("gate"))))
    if verdict.passed or force:
        return verdict
    raise GateError(
        f"{source.name} is not exported:\n  " + "\n  ".join(verdict.reasons) + "\n"
        "Give an evaluation that passed with export.evaluation=DIRECTORY (stage=evaluate makes one), "
        "train further, or set export.force=true, which the manifest and the model card will record."
    )


def _check_same_model(evaluation: Artifact, source: Source) -> None:
    if source.artifact:
        expected, found = source.artifact.id, evaluation.inputs.get("model", {}).get("id")
    else:
        expected, found = source.fingerprint, evaluation.facts.get("model_fingerprint")
    if found != expected:
        raise GateError(
            f"{evaluation.path} evaluates another model: that one is {found}, "
            f"and {source.path} is {expected}. Evaluate this model: python -m train stage=evaluate "
            f"init_from={source.path}"
        )


def _failures(gate: dict[str, Any] | None) -> list[str]:
    if gate is None:
        return ["the evaluation had no gate"]
    checks = [check for check in gate["checks"] if not check["passed"]]
    reasons = [f"gate: {c['metric']} is {c['found']:.4g}, {c['threshold']} was asked for" for c in checks]
    return reasons or ([] if gate["passed"] else ["the gate failed"])
