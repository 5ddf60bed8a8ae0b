"""Normalisation and quality rules.

Prose is judged by rules of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1), with words taken as what white
space separates: splitting by spaCy, as datatrove's own filter does, is a hundred times slower and changes the counts by
the punctuation it cuts off. Code is judged by those of Codex (Chen et al. 2021, arXiv:2107.03374, section 3.1).
"""

import re
import unicodedata
from collections import Counter

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.typeshelper import StatHints

from data_pipeline.corpus.rules import Rules

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufffe\uffff]")
BLANK_LINES = re.compile(r"\n{4,}")
# Bounded, so that no text makes them slow.
ROLE = re.compile(r"(?<![\w`]):[A-Za-z][\w:+.-]{0,40}:`[~!]?([^`<]{1,300}?)(?:\s{0,9}<[^`>]{1,300}>)?`")
LINK = re.compile(r"(?<![\w`])`([^`<]{1,300}?)\s{0,9}<[^`>]{1,300}>`__?")
LETTER = re.compile(r"[^\W\d_]")
LITERAL = re.compile(r"``([^`\n]+)``")
LABEL = re.compile(r"^[ \t]*\.\. (?:_[^:\n]+:|(?:index|currentmodule|module|highlight|toctree)::).*\n", re.MULTILINE)
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
GENERATED = re.compile(r"auto-?generated|generated (?:by|from)|do not edit", re.IGNORECASE)


class Normalise(PipelineStep):
    """Unicode NFC, line ends as \\n, no control characters, no white space at line ends, at most two blank lines
    together. In prose, reStructuredText roles, links and labels are reduced to what a reader sees.

    Args:
        strip_markup: reduce markup in prose.
    """

    name = "🧹 Normalise"
    type = "✂️ - FORMAT"

    def __init__(self, strip_markup: bool):
        super().__init__()
        self.strip_markup = strip_markup

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for doc in data:
            self.stat_update(StatHints.total)
            with self.track_time():
                doc.text = normalised(doc.text, self.strip_markup and doc.metadata["kind"] == "prose")
            yield doc


def normalised(text: str, strip_markup: bool) -> str:
    """The text as it is learned; normalising twice changes nothing more."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = CONTROL.sub("", text)
    if strip_markup:
        text = LITERAL.sub(r"`\1`", LINK.sub(r"\1", ROLE.sub(r"\1", LABEL.sub("", text))))
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return BLANK_LINES.sub("\n\n\n", text).strip("\n")


class Quality(BaseFilter):
    """Keeps what the rules accept; the reason names the first rule that does not.

    Args:
        rules: the thresholds.
        exclusion_writer: where dropped documents go.
    """

    name = "⚖️ Quality"

    def __init__(self, rules: Rules, exclusion_writer: DiskWriter | None = None):
        super().__init__(exclusion_writer)
        self.rules = rules

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if len(doc.text) < self.rules.least_characters:
            return False, "short"
        if len(doc.text) > self.rules.most_characters:
            return False, "long"
        judge = self.code_fault if doc.metadata["kind"] == "code" else self.prose_fault
        fault = judge(doc.text)
        return (False, fault) if fault else True

    def prose_fault(self, text: str) -> str | None:
        rules = self.rules
        words = text.split()
        if not rules.shortest_words <= sum(map(len, words)) / len(words) <= rules.longest_words:
            return "word_length"
        if (text.count("#") + text.count("...")) / len(words) > rules.symbols:
            return "symbols"
        if (
            sum(word.isalpha() or LETTER.search(word) is not None for word in words) / len(words)
            < rules.alphabetic_words
        ):
            return "few_letters"
        if len(STOP_WORDS.intersection(map(str.lower, words))) < rules.stop_words:
            return "stop_words"
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        if sum(line.startswith(("*", "-", "•")) for line in lines) / len(lines) > rules.bullets:
            return "bullets"
        again = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
        return "repeated_lines" if again / sum(map(len, lines)) > rules.repeated_lines else None

    def code_fault(self, text: str) -> str | None:
        lines = text.split("\n")
        if max(map(len, lines)) > self.rules.longest_line:
            return "long_line"
        if len(text) / len(lines) > self.rules.line_length:
            return "line_length"
        if sum(map(str.isalnum, text)) / len(text) < self.rules.alphanumeric:
            return "few_letters"
        return "generated" if GENERATED.search("\n".join(lines[:10])) else None
