"""The card of conversations, preferences and judged answers: a smaller one than that of a corpus."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.artifact import write_atomically
from data_pipeline.card import contents, sankey
from data_pipeline.card.page import PAGE, drawn, yaml_of
from data_pipeline.card.samples import PER_REASON, READ, drawn_by, excerpt, masked

PER_FILE = 4
"""Records of each file that are shown."""
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
    steps = contents.steps(metrics.get("steps", []), {}, {}, {})
    kept = {stem: [turns(record) for record in few(rows, PER_FILE)] for stem, rows in records.items() if rows}
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
        dropped={reason: [turns(record) for record in few(rows, PER_REASON)] for reason, rows in reasons.items()},
        settings=yaml_of(settings),
        findings=yaml_of({key: value for key, value in metrics.items() if key not in ("records", "steps")}),
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
