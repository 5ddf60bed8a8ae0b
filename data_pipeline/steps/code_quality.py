"""Code that people wrote: rules of Codex (Chen et al. 2021, arXiv:2107.03374, section 3.1) and of The Stack v2
(Lozhkov et al. 2024, arXiv:2402.19173, appendix A) for lines, alphabets, generated files and encoded data."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import CODE, DocumentStep

GENERATED = re.compile(
    r"auto-?\s?generated|(?<!be )generated (?:by|from|automatically|file)|automatically generated"
    r"|do not (?:edit|modify)|machine[- ]generated|@generated",
    re.IGNORECASE,
)
FIRST_LINES = 10
"""Lines in which a generator says so."""
ENCODED = re.compile(
    r"[A-Za-z0-9+/](?<![A-Za-z0-9+/][A-Za-z0-9+/])[A-Za-z0-9+/=]{63,}+"  # base64, and hexadecimal without marks
    r"|[A-Za-z0-9+/](?<![A-Za-z0-9+/][A-Za-z0-9+/])(?:[A-Za-z0-9+/=]{40,128}+[\"'+,\\]{0,4}\s{1,40}[\"']?){4,}+"
    r"|(?:\\x[0-9A-Fa-f]{2}){8,}+"
    r"|(?:\\u\{?[0-9A-Fa-f]{4,6}\}?){8,}+"
)
NUMBERS = re.compile(r"\d(?<![\w.]\d)(?:[\w.+-]{0,31}[,;\s\[\](){}+-]{1,40}(?=\d)\d){15,}+[\w.+-]{0,31}")
"""At least 16 numbers in a row, of any base, with nothing but commas, brackets and white space between."""
LEAST_CHARACTERS = 1000
"""Shorter code has too few characters to say that it lacks white space."""


@register("corpus/step", "code_quality")
@dataclass(frozen=True)
class CodeQuality(DocumentStep):
    """Drop code that is minified, generated, encoded or mostly data. The reason names the first rule that is broken.

    Args:
        line_length: most mean length of lines, in characters.
        longest_line: most characters in one line.
        most_lines: most lines; 0 for no bound.
        alphanumeric: least share of letters and digits.
        letters: least share of letters of any alphabet.
        white_space: least share of white space; minified code has less. Code below 1,000 characters is not judged.
        longest_blob: most characters of encoded data (base64, hexadecimal, escapes) in one piece; 0 for no bound.
        blobs: most share of characters that are encoded data.
        numbers: most share of characters that are in tables of numbers.
        generated: drop files that say in their first ten lines that a program wrote them.
    """

    kinds: list[str] = field(default_factory=lambda: list(CODE))
    line_length: float = 100.0
    longest_line: int = 1000
    most_lines: int = 100_000
    alphanumeric: float = 0.25
    letters: float = 0.25
    white_space: float = 0.04
    longest_blob: int = 1024
    blobs: float = 0.5
    numbers: float = 0.5
    generated: bool = True

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for name in ("alphanumeric", "letters", "white_space", "blobs", "numbers"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(Problem(f"{key}.{name}", getattr(self, name), "a share in [0, 1]"))
        for name in ("line_length", "longest_line"):
            if getattr(self, name) <= 0:
                found.append(Problem(f"{key}.{name}", getattr(self, name), "characters, more than 0"))
        for name in ("most_lines", "longest_blob"):
            if getattr(self, name) < 0:
                found.append(Problem(f"{key}.{name}", getattr(self, name), "0 for no bound, or more"))
        return found

    def judge(self, page: Page) -> str | None:
        text, lines = page.text, page.lines
        if not text:
            return "few_letters"
        characters = Counter(text)

        def share(holds: Callable[[str], bool]) -> float:
            return sum(count for character, count in characters.items() if holds(character)) / len(text)

        if max(map(len, lines)) > self.longest_line:
            return "long_line"
        if len(text) / len(lines) > self.line_length:
            return "line_length"
        if 0 < self.most_lines < len(lines):
            return "many_lines"
        if share(str.isalnum) < self.alphanumeric:
            return "few_letters"
        if self.generated and GENERATED.search("\n".join(lines[:FIRST_LINES])):
            return "generated"
        blobs = lengths(ENCODED.finditer(text))
        if 0 < self.longest_blob < max(blobs, default=0) or sum(blobs) > self.blobs * len(text):
            return "encoded"
        if sum(lengths(NUMBERS.finditer(text))) > self.numbers * len(text):
            return "data"
        if share(str.isalpha) < self.letters:
            return "few_letters"
        if len(text) >= LEAST_CHARACTERS and share(str.isspace) < self.white_space:
            return "minified"
        return None


def lengths(matches: Iterable[re.Match[str]]) -> list[int]:
    return [match.end() - match.start() for match in matches]
