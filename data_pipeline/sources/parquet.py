"""Records in Parquet files."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conf.registry import register
from data_pipeline.sources.base import Fields, FileSource

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_pipeline.readers.reading import Found


@register("corpus/source", "parquet")
@dataclass(frozen=True)
class Parquet(FileSource):
    """Parquet files with one document a row.

    Args:
        fields: columns of the text, id, date, licence and address.
    """

    fields: Fields = field(default_factory=Fields)

    @property
    def endings(self) -> tuple[str, ...]:
        return (".parquet",)

    def reading(self, found: "Found") -> "list[PipelineStep]":
        from data_pipeline.readers.parquet import ParquetReader

        return [ParquetReader(found, self.fields, self.kind)]
