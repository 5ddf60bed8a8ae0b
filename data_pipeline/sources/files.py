"""Local files: plain text, Markdown, programs, archives of these, and JSON lines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conf.registry import register
from data_pipeline.sources.base import CODE, PROSE, Fields, FileSource
from data_pipeline.sources.jsonl import JSON_LINES

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_pipeline.readers.reading import Found

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@register("corpus/source", "files")
@dataclass(frozen=True)
class Files(FileSource):
    """Local files: prose, code, zip and tar archives of them, and JSON lines (plain, .gz or .zst) with one document a
    line. Text is dated by the date in its front matter.

    Args:
        prose: endings of files read as natural language.
        code: endings of files read as code.
        text_key: field of JSON records that holds the text.
        kind: what JSON records hold: "prose" or "code".
    """

    prose: list[str] = field(default_factory=lambda: list(PROSE))
    code: list[str] = field(default_factory=lambda: list(CODE))
    text_key: str = "text"

    @property
    def endings(self) -> tuple[str, ...]:
        return (*self.prose, *self.code, *JSON_LINES, *ARCHIVES)

    def reading(self, found: "Found") -> "list[PipelineStep]":
        from data_pipeline.readers.archives import ArchiveReader
        from data_pipeline.readers.jsonl import StrictJsonlReader
        from data_pipeline.readers.reading import Selection
        from data_pipeline.readers.text import TextFileReader

        selection = Selection(tuple(self.prose), tuple(self.code), tuple(self.exclude))

        def chosen(reads: Callable[[str], Any]) -> "Found":
            kept = [(origin, [name for name in names if reads(name)]) for origin, names in found]
            return [(origin, names) for origin, names in kept if names]

        readers: list[PipelineStep] = []
        if texts := chosen(selection.kind):
            readers.append(TextFileReader(texts, selection))
        if archives := chosen(lambda name: name.lower().endswith(ARCHIVES)):
            readers.append(ArchiveReader(archives, selection))
        if records := chosen(lambda name: name.lower().endswith(JSON_LINES)):
            readers.append(StrictJsonlReader(records, Fields(text=self.text_key), self.kind))
        return readers
