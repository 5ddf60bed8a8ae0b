"""A few documents to look at: uniform by a hash of the text, so that the same corpus always shows the same ones.

Personal data are not shown: what a step for them dropped or tagged has no text here, and in all other texts they are
replaced.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEPT = 8
"""Documents of the train split that are shown."""
PER_REASON = 2
"""Dropped documents that are shown for each step and reason."""
PAIRS = 3
"""Pairs of copies that are shown for each reason."""
COPIES = "duplicates"
"""Ending of the metadata in which a kept document says how many copies of it were dropped."""
TAG = "pii"
"""Metadata in which a step tells that a document holds personal data."""
LOOKED_THROUGH = 500
"""Documents at the head of each piece that samples are drawn from."""
LENGTH = 420
"""Characters that are shown of a document."""
LINES = 9
LONGEST_ID = 160
READ = 20_000
"""Characters of a document that are looked through for personal data."""


@dataclass(frozen=True)
class Sample:
    """A document as it is shown.

    Args:
        id: its id; empty where it may be personal.
        source: where it comes from.
        licence: of the source.
        characters: length of the document.
        text: its beginning; None where it may not be shown.
    """

    id: str
    source: str
    licence: str
    characters: int
    text: str | None


@dataclass(frozen=True)
class Pair:
    """A document that was dropped as a copy, and the one that was kept."""

    reason: str
    dropped: Sample
    kept: Sample


def kept(pieces: Sequence[Path]) -> list[Sample]:
    """Some documents that remained, of as many sources as possible.

    Args:
        pieces: files of the train split.
    """
    drawn: dict[str, list[dict[str, Any]]] = {}
    for source, record in drawn_by(heads(pieces), lambda record: record["metadata"].get("source", ""), KEPT):
        drawn.setdefault(source, []).append(record)
    turns = itertools.zip_longest(*(drawn[source] for source in sorted(drawn)))
    chosen = [record for turn in turns for record in turn if record is not None]
    return [shown(record) for record in chosen[:KEPT]]


def dropped(files: Iterable[Path], private: bool) -> dict[str, list[Sample]]:
    """Some documents that one step dropped, by reason.

    Args:
        files: its quarantine.
        private: the step drops documents for what may not be shown.
    """
    found: dict[str, list[Sample]] = {}
    for reason, record in drawn_by(heads(sorted(files)), lambda record: record["reason"], PER_REASON):
        found.setdefault(reason, []).append(shown(record, private))
    return found


def pairs(pieces: Sequence[Path], quarantined: Sequence[Path]) -> list[Pair]:
    """Some copies beside what they are copies of, as far as both are found.

    Args:
        pieces: files of the train split.
        quarantined: what steps that look for copies dropped.
    """
    copied = {
        record["id"]: record for record in heads(pieces) if any(name.endswith(COPIES) for name in record["metadata"])
    }
    copies = (record for record in heads(quarantined) if record["metadata"].get("duplicate_of") in copied)
    return [
        Pair(reason, shown(record), shown(copied[record["metadata"]["duplicate_of"]]))
        for reason, record in drawn_by(copies, lambda record: record["reason"], PAIRS)
    ]


def heads(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    from data_pipeline.engine.pieces import read_records

    for file in files:
        if file.exists():
            yield from itertools.islice(read_records(file), LOOKED_THROUGH)


def drawn_by(
    records: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], str], most: int
) -> list[tuple[str, dict[str, Any]]]:
    """(key, record) of at most so many records for each key, the smallest draws first."""
    from data_pipeline.engine.splitting import position

    drawn: dict[str, list[tuple[float, int, dict[str, Any]]]] = {}
    for number, record in enumerate(records):
        heap = drawn.setdefault(key(record), [])
        item = (-position(f"card {record['id']} {record['text']}"), -number, record)
        heapq.heappush(heap, item) if len(heap) < most else heapq.heappushpop(heap, item)
    return [(name, record) for name in sorted(drawn) for *_, record in sorted(drawn[name], reverse=True)]


def shown(record: dict[str, Any], private: bool = False) -> Sample:
    metadata = record["metadata"]
    source, licence = metadata.get("source", ""), metadata.get("licence", "")
    if private or metadata.get(TAG):
        return Sample("", source, licence, len(record["text"]), None)
    name = excerpt(masked(record["id"]), LONGEST_ID)
    return Sample(name, source, licence, len(record["text"]), excerpt(masked(record["text"][:READ])))


def masked(text: str) -> str:
    """With the kind in brackets in place of what is personal or secret."""
    from data_pipeline.personal import find

    parts, done = [], 0
    for found in find(text):
        parts += [text[done : found.begin], f"[{found.kind}]"]
        done = found.end
    return "".join([*parts, text[done:]])


def excerpt(text: str, length: int = LENGTH) -> str:
    """The beginning of a text."""
    text = text.strip("\n")
    beginning = "\n".join(text[:length].split("\n")[:LINES])
    return text if beginning == text else beginning.rstrip() + " …"
