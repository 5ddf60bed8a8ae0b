"""Ids are unique: what names a document in pieces, quarantine and audits names no other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import CorpusStep, Verdict

if TYPE_CHECKING:
    from data_pipeline.engine.survey import Survey

DUPLICATE_ID = "duplicate_id"


@register("corpus/step", "unique_ids")
@dataclass(frozen=True)
class UniqueIds(CorpusStep):
    """Of the documents with equal ids, keep the first. Those made of a file's name and a place in it are unique by
    themselves; those that records bring need not be."""

    def survey(self, survey: "Survey") -> None:
        from data_pipeline.engine.duplicates import find_clusters

        find_clusters(survey, self, digests)

    def verdicts(self, directory: Path, rank: int) -> Callable[[int, Page], Verdict]:
        from data_pipeline.engine.duplicates import judge_copies

        return judge_copies(directory, rank, DUPLICATE_ID)


def digests(page: Page) -> list[tuple[int, list[bytes]]]:
    """One digest: of the id."""
    from xxhash import xxh3_128_digest

    return [(0, [xxh3_128_digest(page.id.encode("utf-8", "surrogatepass"))])]
