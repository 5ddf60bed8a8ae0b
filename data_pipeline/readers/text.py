"""Files of text: plain, Markdown, programs."""

import re
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document

from data_pipeline.readers.reading import LARGEST_TEXT, FileReader, Found, Origin, Selection, decoded, iso, whole

FRONT_MATTER = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.{0,4000}?)\n---[ \t]*\r?\n", re.DOTALL)
DATE = re.compile(rb"^date:[ \t]*[\"']?([0-9][0-9T:Z+. -]{7,40})", re.MULTILINE)


class TextFileReader(FileReader):
    """Text files of directories, or single ones: one document each.

    Args:
        found: the files.
        selection: what each is.
    """

    name = "📄 Text files"

    def __init__(self, found: Found, selection: Selection):
        super().__init__(found)
        self.selection = selection

    def documents(self, file: Path, name: str) -> Iterator[Document]:
        kind = self.selection.kind(name) or self.kind
        yield text_document(self.origin, name, kind, whole(file, LARGEST_TEXT))


def text_document(origin: Origin, path: str, kind: str, content: bytes | None, **metadata: str) -> Document:
    """A document of a file's content, where it is not too large; dated by its front matter, if that has a date."""
    if content is None:
        return origin.document(path, kind, "", fault="too_large", **metadata)
    front = FRONT_MATTER.match(content)
    dated = DATE.search(front[1]) if front else None
    return decoded(origin, path, kind, content, date=iso(dated[1].decode().strip()) if dated else "", **metadata)
