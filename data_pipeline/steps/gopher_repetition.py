"""Rules of repetition in Gopher (Rae et al. 2021, arXiv:2112.11446, table A1), as datatrove's GopherRepetitionFilter.

Shape suffixes: W words, U different words, C characters of these, N n-grams. Arithmetic of hashes is modulo 2^64.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep

LINE_ENDS = re.compile("\n+")
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the polynomials that hash words: odd, so that no character vanishes."""
LARGEST_CODE = 2**63


@register("corpus/step", "gopher_repetition")
@dataclass(frozen=True)
class GopherRepetition(DocumentStep):
    """Drop prose that repeats itself. The reason names the first rule broken.

    Args:
        paragraphs: most share of paragraphs that occurred before in the text; 0 for no rule.
        paragraph_characters: most share of characters in such paragraphs; 0 for no rule.
        lines: most share of lines that occurred before; 0 for no rule.
        line_characters: most share of characters in such lines; 0 for no rule.
        top_n_grams: n -> most share of characters in all occurrences of the most frequent n words in a row.
        duplicate_n_grams: n -> most share of characters in n words in a row that occurred before.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    paragraphs: float = 0.3
    paragraph_characters: float = 0.2
    lines: float = 0.3
    line_characters: float = 0.2
    top_n_grams: dict[int, float] = field(default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16})
    duplicate_n_grams: dict[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for share in ("paragraphs", "paragraph_characters", "lines", "line_characters"):
            if not 0 <= getattr(self, share) <= 1:
                found.append(Problem(f"{key}.{share}", getattr(self, share), "a share in [0, 1]; 0 for no rule"))
        for n_grams in ("top_n_grams", "duplicate_n_grams"):
            for n, most in getattr(self, n_grams).items():
                if n < 1 or most < 0:
                    found.append(Problem(f"{key}.{n_grams}.{n}", most, "n of 1 or more, with a share of 0 or more"))
        return found

    def judge(self, page: Page) -> str | None:
        if not page.text:
            return "empty"
        size = len(page.text)
        paragraphs, characters = occurred_before(page.paragraphs)
        if 0 < self.paragraphs < paragraphs / len(page.paragraphs):
            return "dup_para_frac"
        if 0 < self.paragraph_characters < characters / size:
            return "dup_para_char_frac"
        lines = LINE_ENDS.split(page.text)
        repeated, characters = occurred_before(lines)
        if 0 < self.lines < repeated / len(lines):
            return "dup_line_frac"
        if 0 < self.line_characters < characters / size:
            return "dup_line_char_frac"
        words = Words(page.words)
        for n, most in sorted(self.top_n_grams.items()):
            if len(page.words) >= n and words.top(n) / size > most:
                return f"top_{n}_gram"
        for n, most in sorted(self.duplicate_n_grams.items()):
            if words.repeat_more(n, most, size):
                return f"duplicated_{n}_n_grams"
        return None


def occurred_before(pieces: Collection[str]) -> tuple[int, int]:
    """How many pieces are equal to an earlier one, and how many characters they have."""
    different = set(pieces)
    return len(pieces) - len(different), sum(map(len, pieces)) - sum(map(len, different))


class Words:
    """The words of a text, as numbers.

    Args:
        words: of the text, in order.
    """

    def __init__(self, words: Sequence[str]):
        self.words = words
        different = dict.fromkeys(words)
        self.different = len(different)
        number = dict(zip(different, range(self.different), strict=True))
        self.numbers_W = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
        lengths_U = np.fromiter(map(len, different), np.int64, self.different)
        self.lengths_W = lengths_U[self.numbers_W]
        self.ends_W = np.concatenate([[0], np.cumsum(self.lengths_W)])
        self.text = "".join(words)
        self.hashes_W = hashes(different, lengths_U)[self.numbers_W]
        self.powers_W = powers(int(lengths_U.max(initial=0)))[self.lengths_W]
        self.n = 0
        self.grams_N = np.zeros(len(words), np.uint64)

    def top(self, n: int) -> int:
        """Characters in all occurrences of the most frequent n-gram, spaces within it included.

        Of several as frequent, the one that occurs first counts.
        """
        count = len(self.words) - n + 1
        if self.different**n >= LARGEST_CODE:
            grams = Counter(" ".join(self.words[at : at + n]) for at in range(count))
            gram, most = grams.most_common(1)[0]
            return len(gram) * most
        codes_N = self.numbers_W[:count].copy()
        for k in range(1, n):
            codes_N *= self.different
            codes_N += self.numbers_W[k : k + count]
        ordered_N = np.sort(codes_N)
        ends = np.append(np.flatnonzero(ordered_N[1:] != ordered_N[:-1]) + 1, count)
        counts = np.diff(ends, prepend=0)
        most = int(counts.max())
        first = int(among(codes_N, ordered_N[ends[counts == most] - 1]).argmax()) if most > 1 else 0
        return int(self.ends_W[first + n] - self.ends_W[first] + n - 1) * most

    def repeat_more(self, n: int, share: float, size: int) -> bool:
        """Whether more than a share of a text's characters is in n-grams that occurred before.

        N-grams are equal if their characters are, white space left out. From the first word on, one that occurred
        before is counted and passed over. Those whose hash no other has need not be looked at.

        Args:
            n: words in a row.
            share: of the characters.
            size: characters of the text.
        """
        count = len(self.words) - n + 1
        if count < 2:
            return False
        grams_N = self._grams(n)
        ordered_N = np.sort(grams_N)
        again = ordered_N[1:][ordered_N[1:] == ordered_N[:-1]]
        longest = int((self.ends_W[n:] - self.ends_W[:-n]).max())
        if len(again) * longest / size <= share:
            return False
        before: set[str] = set()
        repeated, passed = 0, 0
        for at in np.flatnonzero(among(grams_N, again)).tolist():
            if at >= passed:
                gram = self.text[self.ends_W[at] : self.ends_W[at + n]]
                if gram in before:
                    repeated += len(gram)
                    passed = at + n
                else:
                    before.add(gram)
        return repeated / size > share

    def _grams(self, n: int) -> np.ndarray:
        """Hash of the characters of each n-gram, made from those of n-grams shorter by a word."""
        if n < self.n:
            self.n, self.grams_N = 0, np.zeros(len(self.words), np.uint64)
        while self.n < n:
            count = len(self.words) - self.n
            last = slice(self.n, self.n + count)
            self.grams_N = self.grams_N[:count] * self.powers_W[last] + self.hashes_W[last]
            self.n += 1
        return self.grams_N


def among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are among some in ascending order."""
    return ordered.take(np.searchsorted(ordered, values), mode="clip") == values


def powers(largest: int) -> np.ndarray:
    """BASE to the power of 0 ... largest."""
    return np.multiply.accumulate(np.concatenate([[np.uint64(1)], np.full(largest, BASE)]))


def hashes(words: Collection[str], lengths_U: np.ndarray) -> np.ndarray:
    """Polynomial of the characters of each word, the last having the power 0.

    So the hash of two words together is that of the first, times BASE to the length of the second, plus that of the
    second.
    """
    if not words:
        return np.zeros(0, np.uint64)
    characters_C = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    ends_U = np.cumsum(lengths_U)
    after_C = np.repeat(ends_U, lengths_U) - np.arange(1, len(characters_C) + 1)
    return np.add.reduceat(characters_C * powers(int(lengths_U.max()))[after_C], ends_U - lengths_U)
