"""Bands of length: too short to teach anything, too long to be a text."""

from dataclasses import dataclass

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import DocumentStep


@register("corpus/step", "length")
@dataclass(frozen=True)
class Length(DocumentStep):
    """Keep documents within bands of length.

    Args:
        least_characters: shorter documents are dropped.
        most_characters: longer ones are dropped; 0 for no bound.
        least_words: documents of fewer words, split as English, are dropped; 0 does not count them.
        most_words: documents of more words are dropped; 0 for no bound.
    """

    least_characters: int = 200
    most_characters: int = 2_000_000
    least_words: int = 0
    most_words: int = 0

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for unit in ("characters", "words"):
            least, most = getattr(self, f"least_{unit}"), getattr(self, f"most_{unit}")
            if least < 0:
                found.append(Problem(f"{key}.least_{unit}", least, "0 or more"))
            if most < 0 or 0 < most < least:
                found.append(Problem(f"{key}.most_{unit}", most, f"0 for no bound, or at least least_{unit}={least}"))
        return found

    def judge(self, page: Page) -> str | None:
        if len(page.text) < self.least_characters:
            return "short"
        if 0 < self.most_characters < len(page.text):
            return "long"
        if self.least_words and len(page.words) < self.least_words:
            return "few_words"
        if self.most_words and len(page.words) > self.most_words:
            return "many_words"
        return None
