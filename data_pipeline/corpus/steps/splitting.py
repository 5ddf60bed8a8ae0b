"""Exact deduplication, and which split a document belongs to: both look at nothing but its text."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)

from data_pipeline.corpus.steps.pieces import ENDING, PieceReader, Tally, execute, quarantine, writer


class AssignSplit(PipelineStep):
    """Writes `metadata["split"]`.

    Args:
        validation: share of validation documents.
        test: share of test documents.
    """

    name = "🔀 Split"
    type = "🔀 - SPLIT"

    def __init__(self, validation: float, test: float):
        super().__init__()
        self.validation = validation
        self.test = test

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for doc in data:
            doc.metadata["split"] = split_of(doc.text, self.validation, self.test)
            yield doc


def split_of(text: str, validation: float, test: float) -> str:
    """A function of the text alone: no document changes its split because others come or go, and equal texts are
    never on two sides."""
    share = position(text)
    return "validation" if share < validation else "test" if share < validation + test else "train"


def position(text: str) -> float:
    """A number in [0, 1) drawn from a hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def content(doc: Document) -> str:
    return doc.text


def deduplicate_and_split(
    pieces: Sequence[Path], directory: Path, validation: float, test: float, workers: int
) -> tuple[Counter[str], Counter[str]]:
    """Drop all but one of the documents with equal text (equal 64-bit hash), and write the rest by split.

    Args:
        pieces: files of documents.
        directory: gets `<split>/<piece>` and `quarantine/<piece>`.
        validation: share of validation documents.
        test: share of test documents.
        workers: processes.

    Returns:
        What the duplicate filter and the tally of splits counted.
    """
    config = ExactDedupConfig(content_getter=content)
    signatures, duplicates, logs = directory / "signatures", directory / "duplicates", directory / "logs"
    duplicates.mkdir(parents=True, exist_ok=True)  # the filter lists it, also when nothing was found
    execute(
        [PieceReader(pieces), ExactDedupSignature(str(signatures), config)], logs / "signatures", len(pieces), workers
    )
    execute([ExactFindDedups(str(signatures), str(duplicates), config)], logs / "duplicates", 1, 1)
    dropped = quarantine(directory / "quarantine", "deduplicate", "duplicate")
    keep = ExactDedupFilter(str(duplicates), config, exclusion_writer=dropped)
    by_split = writer(directory, "${split}/${rank}" + ENDING)
    pipeline = [PieceReader(pieces), keep, AssignSplit(validation, test), Tally(["split"]), by_split]
    totals = execute(pipeline, logs / "split", len(pieces), workers)
    return totals[keep.name], totals[Tally.name]
