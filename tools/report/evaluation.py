"""How the models scored and what they said, from the evaluation's `results.json`."""

from dataclasses import dataclass
from typing import Any

from data_pipeline.tasks import correct
from tools.report.read import Life, read_json, results_of

LESS_IS_BETTER = ("perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Row:
    """One figure of every model.

    Args:
        name: of the figure.
        shown: per model; a dash where it was not measured.
        best: per model, whether none has a better one; all False where there is nothing to compare.
    """

    name: str
    shown: list[str]
    best: list[bool]


@dataclass(frozen=True)
class Scores:
    """A table with a row per figure and a column per model.

    Args:
        models: column heads, in the order of their lives; the last is the one that is judged.
        rows: the figures.
        checks: the gate's, each {"metric", "found", "threshold", "passed"}.
        passed: whether all hold; None without a gate.
    """

    models: list[str]
    rows: list[Row]
    checks: list[dict[str, Any]]
    passed: bool | None


def scores(life: Life) -> Scores | None:
    """None where nothing was evaluated."""
    results = results_of(life.last("evaluation"))
    if not results:
        return None
    models: dict[str, dict[str, float]] = results.get("models", {})
    names = dict.fromkeys(name for figures in models.values() for name in figures)
    rows = [_row(name, [figures.get(name) for figures in models.values()]) for name in names]
    gate = results.get("gate") or {}
    return Scores(list(models), rows, gate.get("checks", []), gate.get("passed"))


def _row(name: str, values: list[float | None]) -> Row:
    measured = [value for value in values if value is not None]
    best = min(measured) if name in LESS_IS_BETTER else max(measured)
    several = len(set(measured)) > 1
    as_share = "accuracy" in name
    shown = ["–" if value is None else f"{value:.1%}" if as_share else f"{value:,.4g}" for value in values]
    return Row(name.replace("_", " "), shown, [several and value == best for value in values])


@dataclass(frozen=True)
class Answer:
    """What one model said; `right` is None where there is nothing to compare with."""

    model: str
    text: str
    right: bool | None


@dataclass(frozen=True)
class Sample:
    """One prompt and what each model makes of it."""

    task: str
    prompt: str
    expected: str
    answers: list[Answer]


def samples(life: Life) -> list[Sample]:
    """The same prompts, put to every model that was evaluated."""
    found = []
    for record in results_of(life.last("evaluation")).get("samples", []):
        expected = record.get("expected", "")
        answers = [
            Answer(model, text, correct(text, expected) if expected else None)
            for model, text in record.get("answers", {}).items()
        ]
        found.append(Sample(record.get("task", ""), record.get("prompt", ""), expected, answers))
    return found


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
