"""Exact deduplication: of documents with equal text, one stays."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import CorpusStep, Verdict

if TYPE_CHECKING:
    from data_pipeline.engine.survey import Survey

DUPLICATE = "duplicate"


@register("corpus/step", "exact")
@dataclass(frozen=True)
class Exact(CorpusStep):
    """Of the documents with equal text (equal 128-bit hash), keep the one whose id comes first."""

    topic: ClassVar[str] = "duplicates"

    def survey(self, survey: "Survey") -> None:
        from data_pipeline.engine.duplicates import find_clusters

        find_clusters(survey, self, digests)

    def verdicts(self, directory: Path, rank: int) -> Callable[[int, Page], Verdict]:
        from data_pipeline.engine.duplicates import judge_copies

        return judge_copies(directory, rank, DUPLICATE)


def digests(page: Page) -> list[tuple[int, list[bytes]]]:
    """One digest: of the text."""
    from xxhash import xxh3_128_digest

    return [(0, [xxh3_128_digest(page.text.encode("utf-8", "surrogatepass"))])]
