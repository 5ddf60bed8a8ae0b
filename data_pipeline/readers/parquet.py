"""Parquet: one document a row."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datatrove.data import Document

from data_pipeline.readers.reading import FileReader, Found, record_document
from data_pipeline.readers.streams import DamageError
from data_pipeline.sources.base import Fields

ROWS = 512
"""Read at a time."""
LARGEST_GROUP = 8 * 2**30
"""Bytes that the columns of a row group may unpack to."""


class ParquetReader(FileReader):
    """Rows of Parquet files, a row group at a time: one that is damaged becomes a fault that says how many rows it
    takes with it, and the next is read.

    Args:
        found: the files.
        fields: columns of the text and what is known of it.
        kind: "prose" or "code".
    """

    name = "🧱 Parquet"

    def __init__(self, found: Found, fields: Fields, kind: str):
        super().__init__(found, kind)
        self.fields = fields

    def documents(self, file: Path, name: str) -> Iterator[Document]:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                first = 0
                for group in range(table.num_row_groups):
                    yield from self.rows(table, group, name, first)
                    first += table.metadata.row_group(group).num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise DamageError(str(error)) from error
        if not first:
            yield self.origin.fault(name, self.kind, "empty")

    def rows(self, table: pyarrow.parquet.ParquetFile, group: int, name: str, first: int) -> Iterator[Document]:
        facts = table.metadata.row_group(group)
        number = first
        there = set(table.schema_arrow.names)
        columns = [key for key in self.fields.columns if key in there]
        try:
            if facts.total_byte_size > LARGEST_GROUP:
                raise DamageError(f"{facts.total_byte_size:,} bytes in a row group; at most {LARGEST_GROUP:,}")
            if not columns:
                raise DamageError(f"no column {self.fields.text}; it has {', '.join(sorted(there))}")
            for batch in table.iter_batches(ROWS, [group], columns, use_threads=False):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    yield record_document(self.origin, f"{name}:{number}", self.kind, row, self.fields)
                    number += 1
            if number != first + facts.num_rows:
                raise DamageError("rows are missing")
        except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError, MemoryError, OSError, DamageError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            detail = f"{error}; {first + facts.num_rows - number:,} rows of row group {group} are lost"
            yield self.origin.fault(f"{name}:{number}+", self.kind, "damaged", detail)
