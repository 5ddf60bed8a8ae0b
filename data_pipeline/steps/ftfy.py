"""Text that was decoded with the wrong encoding, mended (ftfy, Speer 2019)."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep

if TYPE_CHECKING:
    import ftfy as library

ENTITIES: dict[str, str | bool] = {"auto": "auto", "always": True, "never": False}


@register("corpus/step", "ftfy")
@dataclass(frozen=True)
class Ftfy(DocumentStep):
    """Undo wrong decodings ("schÃ¶n"), lone surrogates, terminal escapes and control characters.

    What is right but not plain stays: with the defaults the text is what datatrove's FTFYFormatter makes of it. For
    Unicode normal forms there is the step `normalise`.

    Args:
        entities: HTML entities such as &amp; become what they stand for: `auto` (only in texts without "<"), `always`
            or `never`.
        ligatures: take ligatures apart.
        widths: make full-width letters and half-width kana the usual width; wrong for Chinese and Japanese punctuation.
        quotes: make typographic quotation marks straight.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    entities: str = "auto"
    ligatures: bool = False
    widths: bool = False
    quotes: bool = False

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        if self.entities not in ENTITIES:
            found.append(Problem(f"{key}.entities", self.entities, f"one of {', '.join(ENTITIES)}"))
        return found

    def state(self) -> Any:
        from importlib.metadata import version

        return {"ftfy": version("ftfy")}

    def judge(self, page: Page) -> None:
        import ftfy as library

        before = page.text
        page.text = library.fix_text(before, config=self.config)
        if page.text != before:
            page.counts["mended"] += 1

    @cached_property
    def config(self) -> "library.TextFixerConfig":
        import ftfy as library

        return library.TextFixerConfig(
            unescape_html=ENTITIES[self.entities],
            fix_latin_ligatures=self.ligatures,
            fix_character_width=self.widths,
            uncurl_quotes=self.quotes,
            fix_line_breaks=False,
            normalization=None,
        )
