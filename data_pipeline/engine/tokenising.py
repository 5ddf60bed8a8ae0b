"""From documents to a tokenizer and to token shards."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched

from data_pipeline.encoding import Encoder
from data_pipeline.engine import documents
from data_pipeline.engine.chain import labelled
from data_pipeline.engine.documents import ListDocuments
from data_pipeline.engine.pieces import ENDING, PieceReader, execute, quarantine, read_piece
from data_pipeline.engine.splitting import position
from data_pipeline.executors.base import Executor
from data_pipeline.executors.local import LOCAL
from data_pipeline.shards import ShardWriter, merge
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_report import GROUP, Sizes

BATCH = 500
"""Documents encoded together; bounds memory."""
NAME = "tokenise"
NORMALISED = "normalised"
"""Label of documents that decode to what the tokenizer's own normalisation leaves of them."""


def sample(directory: Path, share: float) -> Iterator[str]:
    """Texts of a split, about this share of the documents, drawn by hash."""
    for file in sorted(directory.glob(f"*{ENDING}")):
        for document in read_piece(file):
            # Another hash than the one that chose the split, under which the train split is no uniform sample.
            if position("sample " + document.text) < share:
                yield document.text


class WriteTokens(PipelineStep):
    """Writes a piece as a shard, and passes on what it wrote. Documents that mention a special token are spelt out;
    each ends with end-of-text.

    A document that the tokenizer cannot express goes to quarantine. datatrove's own step does none of this, and keeps
    the time in the library that `data_pipeline.encoding` saves.

    Args:
        directory: gets `<piece>.bin` and `.idx`.
        tokenizer: its directory.
        dropped: where documents in quarantine go.
    """

    name = "🔢 Tokenise"
    type = "🔢 - TOKENIZER"

    def __init__(self, directory: Path, tokenizer: Path, dropped: Path):
        super().__init__()
        self.directory = directory
        self.tokenizer = tokenizer
        self.dropped = quarantine(dropped)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tokenizer = Tokenizer.load(self.tokenizer)
        encoder = Encoder(tokenizer)
        writer = ShardWriter(self.directory / f"{rank:05d}", encoder.dtype)
        end = np.array([tokenizer.eos], encoder.dtype)
        sizes: dict[tuple[str, ...], Sizes] = {}
        with self.dropped:
            for batch in batched(data, BATCH):
                kept, tokens = [], []
                for document, ids_T in zip(batch, encoder.encode([doc.text for doc in batch]), strict=True):
                    loss = None if tokenizer.lossless else tokenizer.loss(document.text, ids_T.tolist())
                    if loss not in (None, NORMALISED):
                        self.stat_update(f"dropped\t{loss}")
                        metadata = {**document.metadata, "filter_step": NAME, "filter_reason": loss}
                        self.dropped.write(Document(document.text, document.id, metadata=metadata), rank)
                        continue
                    if loss:
                        self.stat_update(f"count\t{loss}")
                    kept.append(document)
                    tokens.append(np.concatenate((ids_T, end)))
                    group = tuple(str(document.metadata.get(key, "")) for key in GROUP)
                    sizes.setdefault(group, Sizes()).add(document.text, len(ids_T))
                writer.write(tokens)
                yield from kept
        writer.close()
        for group, its_sizes in sizes.items():
            for label, size in its_sizes.labelled(group):
                self.stat_update(label, value=size)


def write_shards(
    pieces: Mapping[str, Sequence[Path]],
    directory: Path,
    tokenizer: Path,
    workers: int,
    executor: Executor = LOCAL,
) -> tuple[dict[str, int], dict[str, int], dict[tuple[str, ...], Sizes]]:
    """Tokenise every split into `<directory>/<split>.bin`, `.idx`, and list its documents beside it.

    Args:
        pieces: split -> files of documents.
        directory: of the shards.
        tokenizer: its directory.
        workers: most tasks at the same time.
        executor: where they run.

    Returns:
        Dropped documents by reason, kept ones by what became of them, and sizes by the values of GROUP.
    """
    files = [file for split in pieces.values() for file in split]
    parts = directory / "parts"
    step = WriteTokens(parts, tokenizer, directory / "quarantine")
    listing = ListDocuments(parts, [number for its_files in pieces.values() for number in range(len(its_files))])
    totals = execute([PieceReader(files), step, listing], directory / "logs", len(files), workers, executor)[step.name]
    written = iter([parts / f"{rank:05d}" for rank in range(len(files))])
    for split, its_files in pieces.items():
        its_parts = [next(written) for _ in its_files]
        merge(its_parts, directory / split)
        documents.merge(
            [part.with_name(part.name + documents.ENDING) for part in its_parts],
            directory / f"{split}{documents.ENDING}",
        )
    return labelled(totals, "dropped\t"), labelled(totals, "count\t"), Sizes.read(totals)
