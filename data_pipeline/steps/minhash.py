"""MinHash deduplication: of documents that share most of their shingles, one stays."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.shingles import MinHash, simplified_words
from data_pipeline.steps.base import CorpusStep, Verdict

if TYPE_CHECKING:
    from data_pipeline.engine.survey import Survey

NEAR_DUPLICATE = "near_duplicate"


@register("corpus/step", "minhash")
@dataclass(frozen=True)
class MinHashStep(CorpusStep):
    """Of the documents that are near-duplicates, directly or by way of others, keep the one whose id comes first. Two
    that share a part s of their shingles are found with probability 1 - (1 - s^rows)^bands: with the defaults, which
    are FineWeb's (Penedo et al. 2024, arXiv:2406.17557, section 3.4), 56% of those with s = 0.7, 92% of those with 0.8.
    The documents found are those of datatrove's MinHash blocks.

    Args:
        n: words in a shingle; lower case, without punctuation, every number being 0.
        bands: bands of a signature; more find more.
        rows: hashes in a band; more find less.
        seed: of the hashes.
    """

    topic: ClassVar[str] = "duplicates"

    n: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for name in ("n", "bands", "rows"):
            if getattr(self, name) < 1:
                found.append(Problem(f"{key}.{name}", getattr(self, name), "at least 1"))
        return found

    def survey(self, survey: "Survey") -> None:
        from data_pipeline.engine.duplicates import find_clusters

        find_clusters(survey, self, Signatures(MinHash(self.n, self.bands, self.rows, self.seed)), self.bands)

    def verdicts(self, directory: Path, rank: int) -> Callable[[int, Page], Verdict]:
        from data_pipeline.engine.duplicates import judge_copies

        return judge_copies(directory, rank, NEAR_DUPLICATE)


@dataclass(frozen=True)
class Signatures:
    """Digests of the bands of a page's signature.

    Args:
        minhash: makes them.
    """

    minhash: MinHash

    def __call__(self, page: Page) -> list[tuple[int, list[bytes]]]:
        digests = self.minhash.digests(simplified_words().of(page.text))
        return [(0, digests)] if digests else []
