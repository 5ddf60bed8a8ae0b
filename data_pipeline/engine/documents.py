"""Which document stands where in a shard: `<split>.documents.parquet` beside it, one row per document, in order.

The tokens say nothing of where they come from. A row says it: id, source, licence, and the piece in which the document
went through the steps. Rows are in groups of fixed size, so document n is found without reading the others.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.card import bins
from data_pipeline.engine.pieces import MOST_NAMES, VARIOUS
from data_pipeline.shards import Shard

ENDING = ".documents.parquet"
GROUP = 2**14
"""Rows of a group: what is read to find one document."""
COLUMNS = ("id", "source", "licence", "piece")


class ListDocuments(PipelineStep):
    """Writes `<directory>/<rank>.documents.parquet` of the documents that pass.

    Args:
        directory: where.
        pieces: number of the piece that each task reads.
    """

    name = "🗂️ Documents"
    type = "💽 - WRITER"

    def __init__(self, directory: Path, pieces: Sequence[int]):
        super().__init__()
        self.directory = directory
        self.pieces = pieces

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        rows = Rows(self.directory / f"{rank:05d}{ENDING}")
        piece = self.pieces[rank]
        for document in data:
            metadata = document.metadata
            rows.add(document.id, metadata.get("source", ""), metadata.get("licence", ""), piece)
            yield document
        rows.close()


class Rows:
    """Writes rows in groups of fixed size; the file appears under its name when it is whole.

    Args:
        file: that is written.
    """

    def __init__(self, file: Path):
        import pyarrow
        import pyarrow.parquet

        name = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
        types = {"id": pyarrow.string(), "source": name, "licence": name, "piece": pyarrow.int32()}
        self.schema = pyarrow.schema(types)
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.writer = pyarrow.parquet.ParquetWriter(self._part, self.schema, compression="zstd")
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    @property
    def _part(self) -> Path:
        return self.file.with_name(self.file.name + ".part")

    def add(self, *row: Any) -> None:
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        if len(self.columns["id"]) == GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        self.writer.write_table(pyarrow.table(self.columns, self.schema), row_group_size=GROUP)
        self.columns = {name: [] for name in COLUMNS}

    def close(self) -> None:
        if self.columns["id"]:
            self._flush()
        self.writer.close()
        os.replace(self._part, self.file)


def merge(parts: Sequence[Path], file: Path) -> None:
    """The rows of all parts, in order, in one file."""
    rows = Rows(file)
    for part in parts:
        for row in all_rows(part):
            rows.add(*row)
    rows.close()


def all_rows(file: Path) -> Iterator[tuple[Any, ...]]:
    """(id, source, licence, piece) of every document."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            columns = parquet.read_row_group(group).to_pydict()
            yield from zip(*(columns[name] for name in COLUMNS), strict=True)


def row_of(stem: Path, number: int) -> tuple[Any, ...] | None:
    """(id, source, licence, piece) of one document of a shard; None where its documents are not listed."""
    import pyarrow.parquet

    file = stem.with_name(stem.name + ENDING)
    if not file.exists():
        return None
    with pyarrow.parquet.ParquetFile(file) as parquet:
        (row,) = parquet.read_row_group(number // GROUP).slice(number % GROUP, 1).to_pylist()
    return tuple(row[name] for name in COLUMNS)


def tokens_by_source(shard: Shard, file: Path) -> dict[tuple[str, str], int]:
    """(source, licence) -> tokens of its documents, end-of-text included."""
    import pyarrow.parquet

    found: dict[tuple[str, str], int] = {}
    begin = 0
    with pyarrow.parquet.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            columns = parquet.read_row_group(group, ["source", "licence"]).to_pydict()
            names = list(zip(columns["source"], columns["licence"], strict=True))
            numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
            lengths = shard.lengths_D[begin : begin + len(names)]
            sums = np.bincount([numbers[name] for name in names], weights=lengths)
            for name, number in numbers.items():
                found[name] = found.get(name, 0) + int(sums[number])
            begin += len(names)
    return found


def contents(directory: Path, splits: Sequence[str]) -> dict[str, Any]:
    """What the shards hold: "tokens" by source, licence and split, and "lengths", documents by split and bin of length.

    Args:
        directory: of the shards.
        splits: their names.
    """
    tokens: dict[tuple[str, str], dict[str, int]] = {}
    lengths: dict[str, dict[str, int]] = {}
    for split in splits:
        shard = Shard(directory / split)
        for name, count in tokens_by_source(shard, directory / f"{split}{ENDING}").items():
            tokens.setdefault(name, {})[split] = count
        lengths[split] = {}
        for begin in range(0, shard.documents, GROUP):
            for length in shard.lengths_D[begin : begin + GROUP].tolist():
                place = str(bins.of_length(length))
                lengths[split][place] = lengths[split].get(place, 0) + 1
    listed = [
        {"source": name, "licence": licence, "splits": counts} for (name, licence), counts in bounded(tokens).items()
    ]
    return {"tokens": sorted(listed, key=lambda entry: (entry["source"], entry["licence"])), "lengths": lengths}


def bounded(tokens: Mapping[tuple[str, str], dict[str, int]]) -> dict[tuple[str, str], dict[str, int]]:
    """The `MOST_NAMES` with most tokens, the licences of the others of a source being `VARIOUS`."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for rank, (source, licence) in enumerate(sorted(tokens, key=lambda name: (-sum(tokens[name].values()), name))):
        total = found.setdefault((source, licence if rank < MOST_NAMES else VARIOUS), {})
        for split, count in tokens[source, licence].items():
            total[split] = total.get(split, 0) + count
    return found
