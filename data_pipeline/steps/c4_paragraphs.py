"""Rule of paragraphs of mC4 (Xue et al. 2021, arXiv:2010.11934, section 3.1), as datatrove's C4ParagraphFilter."""

from dataclasses import dataclass, field

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep


@register("corpus/step", "c4_paragraphs")
@dataclass(frozen=True)
class C4Paragraphs(DocumentStep):
    """Drop pages with few long lines.

    Args:
        least: fewest long lines.
        long: fewest characters of a long line.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    least: int = 3
    long: int = 200

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        bounds = {"least": self.least, "long": self.long}
        return found + [Problem(f"{key}.{name}", value, "1 or more") for name, value in bounds.items() if value < 1]

    def judge(self, page: Page) -> str | None:
        return "few_paragraphs" if sum(len(line) >= self.long for line in page.lines) < self.least else None
