"""Sentence deduplication: a span of sentences that occurs more than once stays where it comes first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import CorpusStep, Verdict

if TYPE_CHECKING:
    from data_pipeline.engine.survey import Survey


@register("corpus/step", "sentences")
@dataclass(frozen=True)
class Sentences(CorpusStep):
    """Remove all but one of the spans of sentences that occur more than once, and drop what becomes too short (Raffel
    et al. 2020, arXiv:1910.10683, section 2.2). The texts are those of datatrove's sentence deduplication: a span stays
    in the document that comes first in its piece, then in the first piece.

    Args:
        span: sentences in a span; compared in lower case, without punctuation, every number being 0.
        least_words: documents that keep fewer words are dropped, if something was removed; 0 for no bound.
        least_sentences: documents that keep fewer sentences are dropped likewise; 0 for no bound.
    """

    topic: ClassVar[str] = "duplicates"

    span: int = 3
    least_words: int = 50
    least_sentences: int = 3

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for name, least in (("span", 1), ("least_words", 0), ("least_sentences", 0)):
            if getattr(self, name) < least:
                found.append(Problem(f"{key}.{name}", getattr(self, name), f"at least {least}"))
        return found

    def survey(self, survey: "Survey") -> None:
        from data_pipeline.engine.duplicates import find_repeats

        find_repeats(survey, self, self.digests)

    def digests(self, page: Page) -> Iterator[tuple[int, list[bytes]]]:
        """A digest per span, at the number of its first sentence."""
        from datatrove.utils.text import simplify_text
        from xxhash import xxh3_128_digest

        sentences = [simplify_text(sentence) for sentence in page.sentences if not sentence.isspace()]
        for start in range(len(sentences) - self.span + 1):
            if span := " ".join(sentences[start : start + self.span]).strip():
                yield start, [xxh3_128_digest(span.encode("utf-8", "surrogatepass"))]

    def verdicts(self, directory: Path, rank: int) -> Callable[[int, Page], Verdict]:
        from data_pipeline.engine.duplicates import NUMBER, WITHIN, id_of, repeats_in

        place, first_piece, first_place = repeats_in(directory, rank)
        numbers, starts = np.unique(place >> WITHIN, return_index=True)
        ends = np.append(starts, len(place))[1:]
        spans = {int(number): slice(*limits) for number, *limits in zip(numbers, starts, ends, strict=True)}

        def judge(number: int, page: Page) -> Verdict:
            if number not in spans:
                return None
            repeated = (place[spans[number]] & NUMBER).tolist()
            removed = {start + i for start in repeated for i in range(self.span)}
            kept = [sentence for i, sentence in enumerate(page.sentences) if i not in removed]
            page.counts["sentences_removed"] += len(page.sentences) - len(kept)
            page.text = "".join(kept).strip()
            if page.text and self._long_enough(page):
                return None
            first = spans[number].start
            page.metadata["duplicate_of"] = id_of(directory, int(first_piece[first]), int(first_place[first] >> WITHIN))
            return "repeated_sentences"

        return judge

    def _long_enough(self, page: Page) -> bool:
        return len(page.words) >= self.least_words and len(page.sentences) >= self.least_sentences
