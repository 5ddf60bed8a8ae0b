"""Web pages in HTML files."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.registry import register
from data_pipeline.sources.base import FileSource

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_pipeline.readers.reading import Found


@register("corpus/source", "html")
@dataclass(frozen=True)
class Html(FileSource):
    """HTML files (plain, .gz or .zst), of each the main text; with the date and licence that the page states."""

    @property
    def endings(self) -> tuple[str, ...]:
        return tuple(f"{name}{packed}" for name in (".html", ".htm", ".xhtml") for packed in ("", ".gz", ".zst"))

    def reading(self, found: "Found") -> "list[PipelineStep]":
        from data_pipeline.readers.html import HtmlReader

        return [HtmlReader(found, self.kind)]
