"""Rules of FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.6), as datatrove's FineWebQualityFilter."""

from dataclasses import dataclass, field
from functools import cache

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep
from data_pipeline.steps.gopher_repetition import occurred_before


@register("corpus/step", "fineweb")
@dataclass(frozen=True)
class FineWeb(DocumentStep):
    """Drop pages that are lists, menus or repeat lines. Lines of white space do not count; the reason names the rule.

    Args:
        punctuated_lines: least share of lines that end a sentence, in any script.
        unpunctuated: keep pages on which no line at all ends a sentence.
        short_lines: most share of short lines.
        short_line: most characters of a short line.
        repeated_characters: most share of characters in lines that occurred before.
        line_feeds: most line feeds per word.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    punctuated_lines: float = 0.12
    unpunctuated: bool = False
    short_lines: float = 0.67
    short_line: int = 30
    repeated_characters: float = 0.01
    line_feeds: float = 0.3

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for share in ("punctuated_lines", "short_lines", "repeated_characters"):
            if not 0 <= getattr(self, share) <= 1:
                found.append(Problem(f"{key}.{share}", getattr(self, share), "a share in [0, 1]"))
        for most in ("short_line", "line_feeds"):
            if getattr(self, most) < 0:
                found.append(Problem(f"{key}.{most}", getattr(self, most), "0 or more"))
        return found

    def judge(self, page: Page) -> str | None:
        lines = [line for line in page.lines if line and not line.isspace()]
        if not lines:
            return "empty"
        punctuated = sum(line[-1] in sentence_ends() for line in lines) / len(lines)
        if punctuated < self.punctuated_lines and not (self.unpunctuated and punctuated == 0):
            return "line_punct_ratio"
        if sum(len(line) <= self.short_line for line in lines) / len(lines) > self.short_lines:
            return "short_line_ratio"
        line_feeds = page.text.count("\n")
        if occurred_before(lines)[1] / (len(page.text) - line_feeds) > self.repeated_characters:
            return "char_dup_ratio"
        if line_feeds / len(page.words) > self.line_feeds:
            return "list_ratio"
        return None


@cache
def sentence_ends() -> frozenset[str]:
    """Characters that end a sentence in some script."""
    from datatrove.utils.text import TERMINAL_PUNCTUATION

    return frozenset(TERMINAL_PUNCTUATION)
