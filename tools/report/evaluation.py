"""How the models scored and what they said, from the evaluation's `results.json`."""

from dataclasses import dataclass
from typing import Any

from tools.report.read import Life, read_json, results_of


@dataclass(frozen=True)
class Scores:
    """A table with a row per measure and a column per model.

    Args:
        models: column heads, in the order of their lives.
        rows: (measure, value per model; None where it was not measured).
        checks: the gate's, each {"metric", "found", "threshold", "passed"}.
        passed: whether all hold; None without a gate.
    """

    models: list[str]
    rows: list[tuple[str, list[float | None]]]
    checks: list[dict[str, Any]]
    passed: bool | None


@dataclass(frozen=True)
class Sample:
    """One prompt and what each model makes of it."""

    prompt: str
    expected: str
    answers: dict[str, str]


def scores(life: Life) -> Scores | None:
    results = results_of(life.last("evaluation"))
    if not results:
        return None
    rows: list[tuple[str, list[float | None]]] = []
    for key in ("perplexity", "bits_per_byte"):
        if key in results:
            rows.append((key.replace("_", " "), [results[key]]))
    for name, task in results.get("tasks", {}).items():
        rows.append((name, [task.get("accuracy")]))
    gate = results.get("gate", {})
    return Scores(["model"], rows, gate.get("checks", []), gate.get("passed"))


@dataclass(frozen=True)
class Handover:
    """What the verification compared.

    Args:
        passed: all checks did.
        checks: each {"name", "found", "threshold", "passed", "detail"}.
        forced: why the export was refused before it was forced; empty where the gate passed.
    """

    passed: bool
    checks: list[dict[str, Any]]
    forced: list[str]


def handover(life: Life) -> Handover | None:
    """Also of a verification that failed, which leaves its checks but no artifact."""
    for stage in reversed(life.stages):
        found = read_json(stage.directory / "verify.json")
        if found.get("checks"):
            export = life.last("export")
            reasons = export.facts.get("gate", {}).get("reasons", []) if export else []
            return Handover(bool(found.get("passed")), found["checks"], reasons)
    return None


def samples(life: Life) -> list[Sample]:
    return []
