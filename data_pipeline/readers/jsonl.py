"""JSON lines: plain, .gz or .zst, with one document a line."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import orjson
from datatrove.data import Document

from data_pipeline.readers.reading import FileReader, Found, record_document
from data_pipeline.readers.streams import LONGEST_LINE, lines
from data_pipeline.sources.base import Fields


class StrictJsonlReader(FileReader):
    """JSON lines. datatrove's own reader logs a broken line and goes on without it; this one passes it on as a fault.

    Args:
        found: the files.
        fields: where the text and what is known of it are in a record.
        kind: "prose" or "code".
    """

    name = "📜 JSON lines"

    def __init__(self, found: Found, fields: Fields, kind: str):
        super().__init__(found, kind)
        self.fields = fields

    def documents(self, file: Path, name: str) -> Iterator[Document]:
        found = 0
        for number, line in enumerate(lines(file), 1):
            path = f"{name}:{number}"
            content = line.content.removeprefix(codecs.BOM_UTF8) if number == 1 else line.content
            if not content.strip():
                continue
            found += 1
            if not line.whole:
                detail = f"{line.size:,} bytes; at most {LONGEST_LINE:,}"
                yield self.origin.fault(path, self.kind, "long_line", detail, content)
                continue
            try:
                record = orjson.loads(content)
            except orjson.JSONDecodeError as error:
                yield self.origin.fault(path, self.kind, "not_json", str(error), content)
                continue
            yield record_document(self.origin, path, self.kind, record, self.fields)
        if not found:
            yield self.origin.fault(name, self.kind, "empty")
