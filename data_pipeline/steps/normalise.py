"""Unicode and white space: one form for what looks the same."""

import re
import unicodedata
from dataclasses import dataclass

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import DocumentStep

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufffe\uffff]")
BLANK_LINES = re.compile(r"\n{4,}")
FORMS = ("NFC", "NFKC")


@register("corpus/step", "normalise")
@dataclass(frozen=True)
class Normalise(DocumentStep):
    """Line ends as \\n, no control characters, no white space at line ends, at most two blank lines together.

    Args:
        form: Unicode normal form: NFC, or NFKC, which also folds ligatures, full-width letters and superscripts.
    """

    form: str = "NFC"

    def problems(self, key: str) -> list[Problem]:
        found = [] if self.form in FORMS else [Problem(f"{key}.form", self.form, f"one of {', '.join(FORMS)}")]
        return super().problems(key) + found

    def judge(self, page: Page) -> None:
        text = page.text.replace("\r\n", "\n").replace("\r", "\n")
        text = unicodedata.normalize(self.form, text)  # type: ignore[arg-type]  # one of FORMS
        page.text = tidied(CONTROL.sub("", text))


def tidied(text: str) -> str:
    """Without white space at line ends, and with at most two blank lines together."""
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return BLANK_LINES.sub("\n\n\n", text).strip("\n")
