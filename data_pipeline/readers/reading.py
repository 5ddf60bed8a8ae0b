"""What all readers share: where documents come from, what is wrong with them, and files that are read one by one.

A reader drops nothing. What cannot be used is passed on with its fault, for the step that follows to put in
quarantine: a line that is no JSON must be counted, not skipped.

What is wrong with the bytes (damaged, breaks off, not UTF-8, another shape) is such a fault, and everything before and
after it is read. What is wrong with the place (a file that vanishes, changes or cannot be read meanwhile) stops the
build, as the next run would find other text.
"""

import codecs
import errno
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.base import BaseReader

from data_pipeline.page import Page
from data_pipeline.readers.streams import DamageError, blocks, vanished
from data_pipeline.sources.base import Fields, excluded
from data_pipeline.steps.base import DocumentStep, Verdict

FAULT = "fault"
"""Metadata key: why a document cannot be used."""
DETAIL = "detail"
"""Metadata key: more about the fault, for who looks into quarantine."""
PASSED_OVER = "passed_over\t"
"""Beginning of the label under which a reader counts what is no text of the sort that it reads: requests, pictures."""
LARGEST_TEXT = 64 * 2**20
"""Bytes. A larger file of text is no document."""
LONGEST_NAME = 500
"""Characters of an id or licence that a record brings."""
SHOWN = 10_000
"""Characters kept of what cannot be read."""
UNTRUE = (None, errno.EINVAL)
"""Of errors that do not come from the place but from bytes: a library's own, and of seeking where they send it."""
LARGEST_EPOCH_S = 4e9
"""A larger time is in milliseconds; 2096."""


@dataclass(frozen=True)
class Selection:
    """Which files are read, and as what.

    Args:
        prose: endings of files that are natural language.
        code: endings of files that are programs.
        exclude: patterns (as in a shell) of paths that are left out.
    """

    prose: tuple[str, ...]
    code: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    def excludes(self, path: str) -> bool:
        return excluded(path, self.exclude)

    def kind(self, path: str) -> str | None:
        """ "prose", "code", or None for a file that is not read."""
        if self.excludes(path):
            return None
        ending = PurePosixPath(path).suffix.lower()
        return "prose" if ending in self.prose else "code" if ending in self.code else None


@dataclass(frozen=True)
class Origin:
    """Where documents come from.

    Args:
        name: package, data set or directory.
        version: as pinned; empty where there is none.
        licence: as its metadata states it.
        home: where a person reads about it; empty where there is none.
        path: archive, file or directory that is read.
        date: of documents that bear none themselves, as ISO 8601; empty where it is not known.
    """

    name: str
    version: str
    licence: str
    home: str
    path: str
    date: str = ""

    def metadata(self, path: str, kind: str) -> dict[str, Any]:
        stated = {"version": self.version, "licence": self.licence, "home": self.home, "date": self.date}
        return {"source": encodable(self.name), **stated, "path": encodable(path), "kind": kind}

    def document(self, path: str, kind: str, text: str, **metadata: str) -> Document:
        """A document, with its fault if it has one.

        Args:
            path: names it within the origin.
            kind: "prose" or "code".
            text: its text.
            metadata: beyond, or in place of, what the origin knows; a date or licence only where it is not empty.
        """
        known = {key: value for key, value in metadata.items() if value}
        found = self.metadata(path, kind) | known
        found["licence"] = " ".join(found["licence"].split())[:LONGEST_NAME]
        if FAULT not in found:
            if not text.strip():
                found[FAULT] = "empty"
            elif "\0" in text:
                found[FAULT] = "nul_bytes"
        return Document(text=text, id=f"{encodable(self.name)}/{found['path']}", metadata=found)

    def fault(self, path: str, kind: str, reason: str, detail: str = "", content: bytes | str = b"") -> Document:
        """A document that stands for what cannot be used, with as much of it as a person needs to see."""
        text = content if isinstance(content, str) else content[: 4 * SHOWN].decode("utf-8", errors="replace")
        return self.document(path, kind, text[:SHOWN], **{FAULT: reason, DETAIL: detail})


def encodable(name: str) -> str:
    """A file's name, with an escape in place of each byte that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def decoded(origin: Origin, path: str, kind: str, content: bytes, **metadata: str) -> Document:
    """A document of a file's content: UTF-8, or UTF-16 that says so by its first bytes."""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        text = content.decode("utf-8", errors="replace")
        return origin.document(path, kind, text, **metadata, fault="not_utf8", detail=str(error))
    return origin.document(path, kind, text, **metadata)


def record_document(origin: Origin, path: str, kind: str, record: Any, fields: Fields) -> Document:
    """A document of one record; without a text it carries the record and a fault."""
    text = fields.value(record, fields.text)
    if not isinstance(text, str):
        return origin.fault(path, kind, "no_text", f"no text in {fields.text}", plain(record))
    if not text.isascii() and text != text.encode("utf-8", "replace").decode():
        return origin.fault(path, kind, "not_utf8", "half a surrogate pair", plain(record))
    found = {key: named(fields.value(record, getattr(fields, key))).strip() for key in ("licence", "url")}
    when = iso(fields.value(record, fields.date))
    if not fields.id:
        return origin.document(path, kind, text, date=when, **found)
    own = named(fields.value(record, fields.id))
    if not own:
        return origin.document(path, kind, text, date=when, **found, fault="no_id", detail=f"no id in {fields.id}")
    document = origin.document(path, kind, text, date=when, **found)
    document.id = f"{encodable(origin.name)}#{own}"
    return document


def named(value: Any) -> str:
    """A name out of a record: a string, a number, or a list of them."""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(named, value[:LONGEST_NAME])))[:LONGEST_NAME]
    return encodable(str(value))[:LONGEST_NAME] if isinstance(value, str | int | float) else ""


def plain(record: Any) -> str:
    """A record as a person reads it, whatever is in it."""
    try:
        return orjson.dumps(record, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except (TypeError, RecursionError):
        return encodable(ascii(record)[:SHOWN])


def iso(value: Any) -> str:
    """A date as ISO 8601; empty where the value says none.

    Args:
        value: a date, seconds or milliseconds since 1970, ISO 8601, or as in e-mails and HTTP.
    """
    try:
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                value = parsedate_to_datetime(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = datetime.fromtimestamp(value / 1000 if abs(value) > LARGEST_EPOCH_S else value, UTC)
        if isinstance(value, datetime) and value.tzinfo:
            return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return value.isoformat() if isinstance(value, date) else ""
    except (ValueError, TypeError, OverflowError, OSError, IndexError):
        return ""


Found = Sequence[tuple[Origin, Sequence[str]]]
"""Of each origin the files to read, by their names relative to the origin's path."""


class FileReader(BaseReader):
    """Reads files, each in one task.

    Args:
        found: the files.
        kind: "prose" or "code".
    """

    origin: Origin
    """Of the file that is read now."""

    def __init__(self, found: Found, kind: str = "prose"):
        super().__init__()
        self.kind = kind
        self.files = [(origin, name, stamp(Path(origin.path) / name)) for origin, names in found for name in names]

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        for origin, name, seen in self.files[rank::world_size]:
            self.origin = origin
            for doc in self.checked(name, seen):
                self.update_doc_stats(doc)
                yield doc

    def checked(self, name: str, seen: tuple[int, int]) -> Iterator[Document]:
        """The documents of one file, and where it is damaged a fault in its name.

        Args:
            name: of the file.
            seen: its stamp when it was found.

        Raises:
            SourceError: the file is not what was found at first.
        """
        file = Path(self.origin.path) / name
        try:
            yield from self.documents(file, name)
        except DamageError as error:
            yield self.origin.fault(name, self.kind, "damaged", str(error), error.rest)
        except OSError as error:
            if error.errno in UNTRUE:
                yield self.origin.fault(name, self.kind, "damaged", str(error))
            else:
                raise vanished(file, error) from error
        if stamp(file) != seen:
            raise vanished(file, OSError(None, "it has changed meanwhile"))

    @abstractmethod
    def documents(self, file: Path, name: str) -> Iterator[Document]:
        """What a file holds.

        Args:
            file: where it is.
            name: its name within the origin.

        Raises:
            DamageError: nothing more can be read of it.
        """


def passed_over(totals: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """What readers counted under `PASSED_OVER`, as the manifest has it.

    Args:
        totals: name of a pipeline step -> label -> total.
    """
    found: Counter[tuple[str, str]] = Counter()
    for labels in totals.values():
        for label, count in labels.items():
            if label.startswith(PASSED_OVER):
                source, _, sort = label.removeprefix(PASSED_OVER).rpartition("\t")
                found[source, sort] += count
    return [{"source": source, "sort": sort, "number": count} for (source, sort), count in sorted(found.items())]


def stamp(file: Path) -> tuple[int, int]:
    """What changes when a file is written: size in bytes, time in nanoseconds.

    Raises:
        SourceError: it is not there.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise vanished(file, error) from error
    return status.st_size, status.st_mtime_ns


def whole(file: Path, largest: int) -> bytes | None:
    """All content of a file; None where that is more than so many bytes.

    Raises:
        DamageError: the compressed data are damaged or break off.
        SourceError: the file is not there any more.
    """
    parts, size = [], 0
    for block in blocks(file):
        parts.append(block)
        size += len(block)
        if size > largest:
            return None
    return b"".join(parts)


@dataclass(frozen=True)
class Usable(DocumentStep):
    """Drop the documents that a reader found a fault in."""

    def judge(self, page: Page) -> Verdict:
        return page.metadata.pop(FAULT, None)
