"""Votes of annotators on which of two answers is better.

items   {"id", "prompt", "responses": [a, b]}         prompt and responses as text or messages
votes   {"item", "annotator", "label": "a" | "b" | "tie"}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.agreement import Label
from data_pipeline.formats.base import turns
from data_pipeline.records import RecordError, found, listed, message_faults
from data_pipeline.rows import rows

SIDES = ("a", "b")
TIE = "tie"
LABELS = (*SIDES, TIE)


def read_items(file: Path) -> dict[str, dict[str, Any]]:
    """Items by their id.

    Raises:
        RecordError: lists every item with a fault.
        FileError: the file is damaged.
    """
    items: dict[str, dict[str, Any]] = {}
    bad = []
    for row in rows(file):
        faults = [row.fault] if row.reason else _item_faults(row.value, items)
        bad += [f"{file}:{row.number}: {fault}" for fault in faults]
        if not faults:
            items[row.value["id"]] = row.value
    if bad or not items:
        raise RecordError(listed(bad or [f"{file}: no item; expected at least one"], "fault", file))
    return items


def read_votes(files: Sequence[Path], items: Mapping[str, Any]) -> dict[str, dict[str, Label]]:
    """Item -> annotator -> label. Items on which nobody voted are there, without labels.

    Args:
        files: of votes, one of all annotators or one each.
        items: what may be voted on.

    Raises:
        RecordError: lists every vote with a fault; two of one annotator on one item that differ are one.
        FileError: a file is damaged.
    """
    votes: dict[str, dict[str, Label]] = {item: {} for item in items}
    bad = []
    for file in files:
        for row in rows(file):
            faults = [row.fault] if row.reason else _vote_faults(row.value, votes)
            bad += [f"{file}:{row.number}: {fault}" for fault in faults]
            if not faults:
                votes[row.value["item"]][row.value["annotator"]] = row.value["label"]
    if bad:
        raise RecordError(listed(bad, "fault", ", ".join(map(str, files))))
    return votes


def preference(item: Mapping[str, Any], labels: Mapping[str, Label], winner: Label) -> dict[str, Any]:
    """A decided item as a record of preferences, with the votes that decided it."""
    best = SIDES.index(str(winner))
    counts = {label: list(labels.values()).count(label) for label in LABELS}
    answers = {"chosen": item["responses"][best], "rejected": item["responses"][1 - best]}
    left = {key: value for key, value in item.items() if key != "responses"}
    return {**left, **answers, "votes": counts}


def _item_faults(item: Any, known: Mapping[str, Any]) -> list[str]:
    if not isinstance(item, dict):
        return [f'{found(item)}; expected {{"id", "prompt", "responses": [a, b]}}']
    faults = []
    if not isinstance(item.get("id"), str) or not item["id"]:
        faults.append(f"id is {found(item.get('id'))}; expected text")
    elif item["id"] in known:
        faults.append(f"id {item['id']} was given before; expected one item an id")
    faults += _said_faults(item.get("prompt"), "prompt", "user")
    answers = item.get("responses")
    if not isinstance(answers, list) or len(answers) != len(SIDES):
        return [*faults, f"responses is {found(answers)}; expected two answers, a and b"]
    for number, answer in enumerate(answers):
        faults += _said_faults(answer, f"responses[{number}]", "assistant")
    return faults


def _said_faults(value: Any, where: str, role: str) -> list[str]:
    """What keeps a value from being text or messages; see `turns`."""
    if not isinstance(value, str | list):
        return [f"{where} is {found(value)}; expected text or messages"]
    faults: list[str] = []
    said = turns(value, where, role, faults)
    return faults or message_faults(said, where)


def _vote_faults(vote: Any, votes: Mapping[str, Mapping[str, Label]]) -> list[str]:
    if not isinstance(vote, dict):
        return [f'{found(vote)}; expected {{"item", "annotator", "label"}}']
    faults = [
        f"{key} is {found(vote.get(key))}; expected text"
        for key in ("item", "annotator")
        if not isinstance(vote.get(key), str) or not vote[key]
    ]
    if vote.get("label") not in LABELS:
        faults.append(f"label is {found(vote.get('label'))}; expected one of {', '.join(LABELS)}")
    if faults:
        return faults
    if vote["item"] not in votes:
        return [f"item {vote['item']} is not among the items"]
    before = votes[vote["item"]].get(vote["annotator"], vote["label"])
    if before != vote["label"]:
        return [f"{vote['annotator']} voted {before} on {vote['item']} before; expected one vote"]
    return []
