"""Chats with assistants, as people export them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.registry import register
from data_pipeline.sources.base import FileSource
from data_pipeline.sources.jsonl import JSON_LINES

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_pipeline.readers.reading import Found


@register("corpus/source", "exports")
@dataclass(frozen=True)
class Exports(FileSource):
    """Exports of chats as ChatGPT and Claude give them (.json, or the .zip with it), and JSON lines of messages; one
    document a conversation, with its speakers. For conversations to train on as such, see corpus=chats."""

    @property
    def endings(self) -> tuple[str, ...]:
        return (".json", ".zip", *JSON_LINES)

    def reading(self, found: "Found") -> "list[PipelineStep]":
        from data_pipeline.readers.exports import ExportReader

        return [ExportReader(found, self.kind)]
