"""Readers: files, source distributions and records become datatrove documents.

A reader drops nothing. What cannot be used is passed on with its fault, for the filter that follows to put in
quarantine: a line that is no JSON must be counted, not skipped.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
import zstandard
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.readers.huggingface import HuggingFaceDatasetReader
from datatrove.pipeline.readers.jsonl import JsonlReader

from data_pipeline.page import Page
from data_pipeline.sources.base import SourceError
from data_pipeline.steps.base import DocumentStep, Verdict

FAULT = "fault"
"""Metadata key: why a document cannot be used."""
LARGEST_FILE = 4 * 2**20
"""Bytes. A larger file in a source distribution is data, not text."""
BLOCK = 2**20
"""Bytes read at a time."""


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
        return any(fnmatch("/" + path, pattern) for pattern in self.exclude)

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
        url: where a person reads about it; empty where there is none.
        path: archive, file or directory that is read.
    """

    name: str
    version: str
    licence: str
    url: str
    path: str

    def metadata(self, path: str, kind: str) -> dict[str, str]:
        named = {"source": self.name, "version": self.version, "licence": self.licence, "url": self.url}
        return {**named, "path": path, "kind": kind}


def document(origin: Origin, path: str, kind: str, content: bytes) -> Document:
    """A document of a file's content, with its fault if it has one."""
    metadata = origin.metadata(path, kind)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text, metadata[FAULT] = content.decode("utf-8", errors="replace"), "not_utf8"
    if not text.strip():
        metadata[FAULT] = "empty"
    return Document(text=text, id=f"{origin.name}/{path}", metadata=metadata)


class SdistReader(BaseReader):
    """Text files of source distributions, read from the archive without unpacking it: members are untrusted, and
    nothing of them touches the disk. Links and special files are not followed.

    Args:
        origins: one per archive; a task reads whole archives.
        selection: which members.
    """

    name = "📦 Source distributions"

    def __init__(self, origins: Sequence[Origin], selection: Selection):
        super().__init__()
        self.origins = origins
        self.selection = selection

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        for origin in self.origins[rank::world_size]:
            for doc in self.members(origin):
                self.update_doc_stats(doc)
                yield doc

    def members(self, origin: Origin) -> Iterator[Document]:
        with tarfile.open(origin.path) as archive:
            for member in archive:
                path = "/".join(PurePosixPath(member.name).parts[1:])  # below the directory name-version/
                kind = self.selection.kind(path)
                if kind is None or not member.isfile():
                    continue
                if member.size > LARGEST_FILE:
                    metadata = origin.metadata(path, kind) | {FAULT: "too_large"}
                    yield Document(text="", id=f"{origin.name}/{path}", metadata=metadata)
                    continue
                stream = archive.extractfile(member)
                assert stream is not None  # a regular file has content
                yield document(origin, path, kind, stream.read())


class TextFileReader(BaseReader):
    """Text files of directories, or single ones.

    Args:
        origin: what they are part of; its path is the directory that document names are relative to.
        files: paths relative to the origin's, with the kind of each.
    """

    name = "📄 Text files"

    def __init__(self, origin: Origin, files: Sequence[tuple[str, str]]):
        super().__init__()
        self.origin = origin
        self.files = files

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        for file, kind in self.files[rank::world_size]:
            doc = document(self.origin, file, kind, (Path(self.origin.path) / file).read_bytes())
            self.update_doc_stats(doc)
            yield doc


class StrictJsonlReader(JsonlReader):
    """JSON lines (.jsonl, .gz, .zst). datatrove's own reader logs a broken line and goes on without it; this one passes
    it on as a fault.

    Args:
        origin: what the files are part of.
        files: paths relative to the origin's.
        text_key: field that holds the text.
        kind: "prose" or "code".
    """

    def __init__(self, origin: Origin, files: Sequence[str], text_key: str, kind: str):
        super().__init__(origin.path, text_key=text_key)
        self.origin = origin
        self.files = files
        self.kind = kind

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        for doc in self.read_files_shard(list(self.files[rank::world_size])):
            self.update_doc_stats(doc)
            yield doc

    def read_file(self, filepath: str) -> Iterator[Document]:
        for number, line in enumerate(lines(Path(self.origin.path) / filepath), 1):
            path = f"{filepath}:{number}"
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                metadata = self.origin.metadata(path, self.kind) | {FAULT: "not_json"}
                yield Document(text=line.decode("utf-8", errors="replace"), id=path, metadata=metadata)
            else:
                yield record_document(self.origin, path, self.kind, record, self.text_key)


def lines(file: Path) -> Iterator[bytes]:
    """Lines of a file that is plain, .gz or .zst, without their ends.

    Raises:
        SourceError: the compressed data are damaged or break off.
    """
    rest = b""
    try:
        for block in _blocks(file):
            *whole, rest = (rest + block).split(b"\n")
            yield from whole
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise SourceError(f"{file} is damaged ({error}); copy it again, or leave it out.") from error
    if rest:
        yield rest


def _blocks(file: Path) -> Iterator[bytes]:
    if file.suffix != ".zst":
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield from iter(partial(stream.read, BLOCK), b"")
        return
    # By hand: zstandard's own readers take a file that breaks off for one that ends.
    frame = None
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("it ends within a frame")


def record_document(origin: Origin, path: str, kind: str, record: Any, text_key: str) -> Document:
    """A document of one record; without a text it carries the record and a fault."""
    metadata = origin.metadata(path, kind)
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        text, metadata[FAULT] = orjson.dumps(record, default=str).decode(), "no_text"
    elif not text.strip():
        metadata[FAULT] = "empty"
    return Document(text=text, id=f"{origin.name}/{path}", metadata=metadata)


class HubReader(HuggingFaceDatasetReader):
    """Rows of a Hugging Face data set, by name or from a local directory.

    Args:
        origin: its name and licence.
        options: arguments of `datasets.load_dataset`.
        streaming: read rows as they come in place of downloading first.
        limit: most rows of each task; -1 reads all.
        text_key: column that holds the text.
        kind: "prose" or "code".
    """

    def __init__(self, origin: Origin, options: dict[str, Any], streaming: bool, limit: int, text_key: str, kind: str):
        super().__init__(origin.name, dataset_options=options, streaming=streaming, limit=limit)
        self.origin = origin
        self.key = text_key
        self.kind = kind

    def get_document_from_dict(self, data: dict[str, Any], source_file: str, id_in_file: int | str) -> Document:
        return record_document(self.origin, str(id_in_file), self.kind, data, self.key)


@dataclass(frozen=True)
class Usable(DocumentStep):
    """Drop the documents that a reader found a fault in."""

    def judge(self, page: Page) -> Verdict:
        return page.metadata.pop(FAULT, None)
