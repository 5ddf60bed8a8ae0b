"""Several answers to one prompt, in an order.

    {"prompt", "ranked": [best, ..., worst]}
    {"prompt", "responses": [...], "scores": [...]}    more is better
    {"prompt", "responses": [...], "ranks": [...]}     1 is best
    {"prompt", "responses": [{"content", "score" | "rank"}, ...]}

Every two answers that are not ranked alike become a preference (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).
"""

from itertools import combinations
from typing import Any

from data_pipeline.formats.base import PREFERENCE, Converted, Format, Record, offered, others, tools, turns
from data_pipeline.records import found

MARKS = ("score", "rank")
"""What answers may carry, the first where all have both."""
LEAST = 2
"""Answers that make an order."""


@offered("ranking")
class Ranking(Format):
    """Answers with scores or ranks."""

    keys = ("prompt", "responses")

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        return _pairs(record, _scored(record, faults), faults)


@offered("ranked")
class Ranked(Format):
    """Answers from the best to the worst."""

    keys = ("prompt", "ranked")

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        if not isinstance(record["ranked"], list):
            faults.append(f"ranked is {found(record['ranked'])}; expected a list of answers, the best first")
            return []
        return _pairs(record, [(answer, -place) for place, answer in enumerate(record["ranked"], 1)], faults)


def _scored(record: Record, faults: list[str]) -> list[tuple[Any, float]]:
    """Answers and how good each is."""
    answers = record["responses"]
    if not isinstance(answers, list):
        faults.append(f"responses is {found(answers)}; expected a list of answers")
        return []
    key = next((key for key in ("scores", "ranks") if record.get(key) is not None), None)
    if key is None:
        carried = [{key for key in MARKS if isinstance(a, dict) and a.get(key) is not None} for a in answers]
        key = next((key for key in MARKS if all(key in keys for keys in carried)), MARKS[0])
        return [_marked(answer, f"responses[{number}]", key, faults) for number, answer in enumerate(answers)]
    marks = record[key]
    if not isinstance(marks, list) or len(marks) != len(answers):
        faults.append(f"{key} is {found(marks)}; expected a list of {len(answers)} numbers, one an answer")
        return []
    numbers = [_number(mark, f"{key}[{number}]", key, faults) for number, mark in enumerate(marks)]
    return list(zip(answers, numbers, strict=True))


def _marked(answer: Any, where: str, key: str, faults: list[str]) -> tuple[Any, float]:
    """An answer that brings its own score or rank, whichever of them all answers of the record have."""
    if isinstance(answer, dict):
        content = next((answer[name] for name in ("content", "text", "response") if name in answer), None)
        if answer.get(key) is not None and content is not None:
            return content, _number(answer[key], f"{where}.{key}", key, faults)
    faults.append(
        f'{where} is {found(answer)}; expected {{"content": ..., "score": ...}} as every answer, or a rank in all, '
        "or scores or ranks beside responses"
    )
    return answer, 0.0


def _number(value: Any, where: str, key: str, faults: list[str]) -> float:
    """How good a score or a rank says that an answer is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        faults.append(f"{where} is {found(value)}; expected a number")
        return 0.0
    return -value if key.startswith("rank") else value


def _pairs(record: Record, scored: list[tuple[Any, float]], faults: list[str]) -> list[Converted]:
    """Every two answers of different rank, the better first; each pair once, and none that is there both ways round."""
    if len(scored) < LEAST and not faults:
        faults.append(f"{len(scored)} answers; expected at least {LEAST} to compare")
    best_first = sorted(scored, key=lambda answer: -answer[1])
    shared = {"prompt": turns(record["prompt"], "prompt", "user", faults), **tools(record, faults)}
    left = others(record, "responses", "ranked", "scores", "ranks")
    answers = [
        (turns(answer, f"answer {number} from the best", "assistant", faults), score)
        for number, (answer, score) in enumerate(best_first, 1)
    ]
    ordered: list[tuple[list[Record], list[Record]]] = []
    for (better, high), (worse, low) in combinations(answers, 2):
        if high > low and better != worse and (better, worse) not in ordered:
            ordered.append((better, worse))
    pairs = [
        {**shared, "chosen": better, "rejected": worse, **left}
        for better, worse in ordered
        if (worse, better) not in ordered
    ]
    if not pairs and not faults:
        faults.append("all answers are alike or ranked alike; expected two that differ in both")
    return [Converted(PREFERENCE, pair) for pair in pairs]
