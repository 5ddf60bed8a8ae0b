"""The card of conversations, preferences and judged answers: a smaller one than that of a corpus.

Annotators have numbers here, in the order in which the manifest's `agreement.annotators` names them.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_pipeline.artifact import write_atomically
from data_pipeline.card import contents, sankey
from data_pipeline.card.page import PAGE, drawn, yaml_of
from data_pipeline.card.samples import PER_REASON, READ, drawn_by, excerpt, masked

PER_FILE = 4
"""Records of each file that are shown."""
BY_ANNOTATOR = ("votes", "cohen_kappa")
"""Keys of what is told by annotator, or by pair of them."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What one side says, or one field of a record."""

    role: str
    text: str


def write(
    directory: Path,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    records: Mapping[str, Sequence[Record]],
    quarantine: Sequence[Record] = (),
) -> None:
    """Write the card into an artifact.

    Args:
        directory: of the artifact.
        metrics: of its manifest; "records" by file, "steps" where there are some, and what else was found.
        settings: its recipe.
        records: file stem -> what it holds.
        quarantine: what was dropped, with step and reason.
    """
    counts: dict[str, int] = metrics["records"]
    names = numbered(metrics)
    told = hidden({key: value for key, value in metrics.items() if key != "records"}, names)
    steps = contents.steps(told.pop("steps", []), {}, {}, {})
    kept = {stem: [turns(hidden(record)) for record in few(rows, PER_FILE)] for stem, rows in records.items() if rows}
    reasons: dict[str, list[Record]] = {}
    for record in quarantine:
        reasons.setdefault(f"{record['step']}: {record['reason']}", []).append(record)
    page = drawn(
        "chats.html.jinja",
        title=title(counts),
        records=counts,
        steps=steps,
        flow=flow(steps, counts),
        kept=kept,
        dropped={
            masked(reason): [turns(hidden(record, names)) for record in few(rows, PER_REASON)]
            for reason, rows in reasons.items()
        },
        settings=yaml_of(hidden(settings)),
        findings=yaml_of(told),
    )
    write_atomically(directory / PAGE, page)


def title(records: Mapping[str, int]) -> str:
    """For instance 1,200 records, 1,000 of them to train on."""
    train = sum(count for stem, count in records.items() if stem.endswith("train"))
    return f"{sum(records.values()):,} records, {train:,} of them to train on"


def flow(steps: Sequence[contents.Step], records: Mapping[str, int]) -> Any:
    came = [sankey.Band("records", steps[0].documents_in)] if steps else []
    ends = [sankey.Band(stem, count, " records") for stem, count in records.items()]
    return sankey.draw(came, contents.drawn(steps), ends)


def few(records: Iterable[Record], most: int) -> list[Record]:
    """So many records, drawn by a hash of what they say."""
    named = ({"id": "", "text": json.dumps(record, sort_keys=True), "record": record} for record in records)
    return [one["record"] for _, one in drawn_by(named, lambda one: "", most)]


def numbered(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Annotator, or pair of them -> what the card calls them."""
    annotators = [one["annotator"] for one in metrics.get("agreement", {}).get("annotators", [])]
    names = {annotator: f"annotator {number}" for number, annotator in enumerate(annotators, 1)}
    pairs = itertools.combinations(annotators, 2)
    return names | {f"{one} and {other}": f"{names[one]} and {names[other]}" for one, other in pairs}


def hidden(value: Any, names: Mapping[str, str] = MappingProxyType({}), of: str = "") -> Any:
    """The same shape, with what is personal masked in every text and key, and annotators by their numbers.

    Args:
        value: as JSON; only the beginning of a long text is taken.
        names: from `numbered`; empty where votes are counted rather than told by annotator.
        of: the key that it stands under.
    """
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            shown = (names.get(str(key), "") if of in BY_ANNOTATOR else "") or masked(str(key))
            alike = f"{shown} ({len(found) + 1})" if shown in found else shown
            found[alike] = hidden(item, names, str(key))
        return found
    if isinstance(value, list | tuple):
        return [hidden(item, names) for item in value]
    if isinstance(value, str):
        return (names.get(value, "") if of == "annotator" else "") or masked(value[:READ])
    return value


def turns(record: Record) -> list[Turn]:
    """What is said in a record, in order; fields that are no conversation as they are."""
    found = []
    for key, value in record.items():
        if key in ("step", "reason", "place"):
            continue
        if isinstance(value, dict) and key == "record":
            found += turns(value)
        elif isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value):
            mark = "" if key in ("messages", "prompt") else f", {key}"
            found += [Turn(f"{message['role']}{mark}", shown(message.get("content"))) for message in value]
        elif value not in (None, "", [], {}):
            found.append(Turn(key, shown(value)))
    return found


def shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return excerpt(masked(text[:READ]))
