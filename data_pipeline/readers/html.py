"""HTML files."""

from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document

from data_pipeline.readers.extraction import LARGEST_PAGE, PageReader
from data_pipeline.readers.reading import whole


class HtmlReader(PageReader):
    """HTML files: one document each.

    Args:
        found: the files.
        kind: "prose" or "code".
    """

    name = "🌐 HTML"

    def documents(self, file: Path, name: str) -> Iterator[Document]:
        content = whole(file, LARGEST_PAGE)
        if content is None:
            yield self.origin.fault(name, self.kind, "too_large", f"more than {LARGEST_PAGE:,} bytes")
        else:
            yield self.page(self.origin, name, content)
