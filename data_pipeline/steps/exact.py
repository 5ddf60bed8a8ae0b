"""Exact deduplication: of documents with equal text, one stays."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import CorpusStep, Verdict

if TYPE_CHECKING:
    from datatrove.data import Document

    from data_pipeline.engine.survey import Survey

DUPLICATE = "duplicate"


@register("corpus/step", "exact")
@dataclass(frozen=True)
class Exact(CorpusStep):
    """Drop all but the first of the documents with equal text (equal 64-bit hash)."""

    def survey(self, survey: "Survey") -> None:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig, ExactDedupSignature, ExactFindDedups

        config = ExactDedupConfig(content_getter=content)
        signatures, duplicates = survey.directory / "signatures", survey.directory / "duplicates"
        survey.run("signatures", [survey.reader(), ExactDedupSignature(str(signatures), config)])
        survey.run("duplicates", [ExactFindDedups(str(signatures), str(duplicates), config)], tasks=1)

    def verdicts(self, directory: Path, rank: int) -> Callable[[int, Page], Verdict]:
        file = directory / "duplicates" / "00000" / f"{rank:05d}.c4_dup"
        numbers = set(np.fromfile(file, dtype="<u4").tolist()) if file.exists() else set()
        return lambda number, page: DUPLICATE if number in numbers else None


def content(doc: "Document") -> str:
    return doc.text
