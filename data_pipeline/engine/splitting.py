"""Which split a document belongs to: it depends on nothing but its text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.engine.pieces import ENDING, PieceReader, Tally, execute, tallied, writer
from data_pipeline.engine.portrait import Portrait, portrayed
from data_pipeline.executors.base import Executor
from data_pipeline.executors.local import LOCAL


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


def split(
    pieces: Sequence[Path], directory: Path, validation: float, test: float, workers: int, executor: Executor = LOCAL
) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """Write the documents by split to `<directory>/<split>/<piece>`.

    Args:
        pieces: files of documents.
        directory: gets a directory per split.
        validation: share of validation documents.
        test: share of test documents.
        workers: most tasks at the same time.
        executor: where they run.

    Returns:
        Split -> {"documents", "bytes"}, and the portrait of all documents.
    """
    tally, portrait = Tally(["split"]), Portrait()
    by_split = writer(directory, "${split}/${rank}" + ENDING)
    pipeline = [PieceReader(pieces), AssignSplit(validation, test), tally, portrait, by_split]
    totals = execute(pipeline, directory / "logs", len(pieces), workers, executor)
    splits = {name: counts for (name,), counts in tallied(totals[tally.name]).items()}
    return splits, portrayed(totals[portrait.name])
