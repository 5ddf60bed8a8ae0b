"""Rules of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2), as datatrove's C4QualityFilter."""

import re
from dataclasses import dataclass, field

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep
from data_pipeline.words import count_sentences

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
LINE_ENDS = (".", "?", "!", '"', "'")
LOREM_IPSUM = "lorem ipsum"
JAVASCRIPT = "javascript"
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@register("corpus/step", "c4")
@dataclass(frozen=True)
class C4(DocumentStep):
    """Keep the lines of a page that are sentences, and drop the page if they are few. Lines removed are counted.

    The word list of the paper is not applied: it takes out medicine, law and minorities with what it is meant for.

    Args:
        by_sentence: judge each sentence, not each line; those kept are joined by spaces.
        citations: remove citations as Wikipedia has them, [1].
        terminal_punctuation: remove lines that do not end with . ? ! " ' or that end with an ellipsis.
        least_sentences: fewest sentences in what is kept; 0 for no bound.
        least_words: remove lines of fewer words, separated by white space.
        longest_word: remove lines with a longer word, in characters; 0 for no bound.
        lorem_ipsum: drop pages with "lorem ipsum".
        javascript: remove lines that mention JavaScript.
        curly_bracket: drop pages with "{".
        policies: remove lines on cookies, privacy and terms of use.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    by_sentence: bool = False
    citations: bool = True
    terminal_punctuation: bool = True
    least_sentences: int = 5
    least_words: int = 3
    longest_word: int = 1000
    lorem_ipsum: bool = True
    javascript: bool = True
    curly_bracket: bool = True
    policies: bool = True

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for bound in ("least_sentences", "least_words", "longest_word"):
            if getattr(self, bound) < 0:
                found.append(Problem(f"{key}.{bound}", getattr(self, bound), "0 for no bound, or more"))
        return found

    def judge(self, page: Page) -> str | None:
        # What the whole text does not contain, no line does; a citation between may hide it.
        lower = page.text.lower()
        hidden = self.citations and "[" in lower
        lorem_ipsum = self.lorem_ipsum and (hidden or LOREM_IPSUM in lower)
        javascript = self.javascript and (hidden or JAVASCRIPT in lower)
        policies = [phrase for phrase in POLICIES if hidden or phrase in lower] if self.policies else []
        kept: list[str] = []
        sentences = 0
        for line in map(str.strip, page.sentences if self.by_sentence else page.text.splitlines()):
            if 0 < self.longest_word < len(line) and max(map(len, line.split())) > self.longest_word:
                page.counts["lines_too_long_word"] += 1
                continue
            words = len(line.split(maxsplit=self.least_words))
            if hidden:
                line = CITATION.sub("", line)
            if self.terminal_punctuation and (not line.endswith(LINE_ENDS) or line.endswith("...")):
                page.counts["lines_no_terminal_punctuation"] += 1
                continue
            if words < self.least_words:
                page.counts["lines_too_few_words"] += 1
                continue
            if lorem_ipsum and LOREM_IPSUM in line.lower():
                return "lorem_ipsum"
            if javascript and JAVASCRIPT in line.lower():
                page.counts["lines_javascript"] += 1
                continue
            if self.curly_bracket and "{" in line:
                return "curly_bracket"
            if policies and any(phrase in line.lower() for phrase in policies):
                page.counts["lines_policy"] += 1
                continue
            if sentences < self.least_sentences:
                sentences += 1 if self.by_sentence else count_sentences(line)
            kept.append(line)
        if sentences < self.least_sentences:
            return "too_few_sentences"
        page.text = (" " if self.by_sentence else "\n").join(kept).strip()
        return None
