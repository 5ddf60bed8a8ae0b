"""Web pages as a crawler stored them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.registry import register
from data_pipeline.sources.base import FileSource

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_pipeline.readers.reading import Found


@register("corpus/source", "warc")
@dataclass(frozen=True)
class Warc(FileSource):
    """WARC and WET files (plain, .gz or .zst): of each page the main text, with its address, date and licence."""

    @property
    def endings(self) -> tuple[str, ...]:
        return tuple(f"{name}{packed}" for name in (".warc", ".wet") for packed in ("", ".gz", ".zst"))

    def reading(self, found: "Found") -> "list[PipelineStep]":
        from data_pipeline.readers.warc import WarcReader

        return [WarcReader(found, self.kind)]
