"""Rules of quality in Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1), as datatrove's
GopherQualityFilter."""

from dataclasses import dataclass, field
from functools import cache

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep

STOP_WORDS = ["the", "be", "to", "of", "and", "that", "have", "with"]


@register("corpus/step", "gopher_quality")
@dataclass(frozen=True)
class GopherQuality(DocumentStep):
    """Drop prose whose words, lines and marks are not those of sentences. The reason names the first rule broken.

    Words are split as English, marks among them; "but marks" leaves out words of nothing but punctuation.

    Args:
        least_words: fewest words but marks; 0 for no rule, as in all fields.
        most_words: most words but marks.
        shortest_words: least mean length of words but marks, in characters.
        longest_words: most mean length of words but marks, in characters.
        symbols: most "#", and most ellipses, per word.
        bullets: most share of lines that begin with "•" or "-".
        ellipses: most share of lines that end with an ellipsis.
        alphabetic_words: least share of words with a letter.
        least_stop_words: fewest different stop words.
        stop_words: common words, in small letters.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    least_words: int = 50
    most_words: int = 100_000
    shortest_words: float = 3.0
    longest_words: float = 10.0
    symbols: float = 0.1
    bullets: float = 0.9
    ellipses: float = 0.3
    alphabetic_words: float = 0.8
    least_stop_words: int = 2
    stop_words: list[str] = field(default_factory=lambda: list(STOP_WORDS))

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for unit in ("least_words", "most_words", "shortest_words", "longest_words", "symbols", "least_stop_words"):
            if getattr(self, unit) < 0:
                found.append(Problem(f"{key}.{unit}", getattr(self, unit), "0 for no rule, or more"))
        for share in ("bullets", "ellipses", "alphabetic_words"):
            if not 0 <= getattr(self, share) <= 1:
                found.append(Problem(f"{key}.{share}", getattr(self, share), "a share in [0, 1]; 0 for no rule"))
        if self.least_stop_words > len(set(self.stop_words)):
            expected = f"at most the number of stop_words, {len(set(self.stop_words))}"
            found.append(Problem(f"{key}.least_stop_words", self.least_stop_words, expected))
        return found

    def judge(self, page: Page) -> str | None:
        words = page.words
        others = [word for word in words if not word.isalpha()]
        marks = [word for word in others if punctuation().issuperset(word)]
        count = len(words) - len(marks)
        if not words or count < self.least_words:
            return "gopher_short_doc"
        if 0 < self.most_words < count:
            return "gopher_long_doc"
        if count:
            length = (sum(map(len, words)) - sum(map(len, marks))) / count
            if length < self.shortest_words:
                return "gopher_below_avg_threshold"
            if 0 < self.longest_words < length:
                return "gopher_above_avg_threshold"
        return self._fault_of_symbols(page) or self._fault_of_words(words, others)

    def _fault_of_symbols(self, page: Page) -> str | None:
        words = len(page.words)
        if 0 < self.symbols < page.text.count("#") / words:
            return "gopher_too_many_hashes"
        ellipses = page.text.count("...") + page.text.count("…")
        if 0 < self.symbols < ellipses / words:
            return "gopher_too_many_ellipsis"
        lines = page.text.splitlines()
        if 0 < self.bullets < sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines):
            return "gopher_too_many_bullets"
        if ellipses and 0 < self.ellipses < sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines):
            return "gopher_too_many_end_ellipsis"
        return None

    def _fault_of_words(self, words: list[str], others: list[str]) -> str | None:
        without_letters = sum(not any(map(str.isalpha, word)) for word in others)
        if (len(words) - without_letters) / len(words) < self.alphabetic_words:
            return "gopher_below_alpha_threshold"
        if len(set(self.stop_words).intersection(words)) < self.least_stop_words:
            return "gopher_enough_stop_words"
        return None


@cache
def punctuation() -> frozenset[str]:
    """Marks and control characters; no letters."""
    from datatrove.utils.text import PUNCTUATION_SET

    return frozenset(PUNCTUATION_SET)
