"""Records in JSON lines."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conf.registry import register
from data_pipeline.sources.base import Fields, FileSource

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_pipeline.readers.reading import Found

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@register("corpus/source", "jsonl")
@dataclass(frozen=True)
class JsonLines(FileSource):
    """JSON lines (plain, .gz or .zst) with one document a line.

    Args:
        fields: where a record has its text, id, date, licence and address.
    """

    fields: Fields = field(default_factory=Fields)

    @property
    def endings(self) -> tuple[str, ...]:
        return JSON_LINES

    def reading(self, found: "Found") -> "list[PipelineStep]":
        from data_pipeline.readers.jsonl import StrictJsonlReader

        return [StrictJsonlReader(found, self.fields, self.kind)]
