"""A document on its way through curation, with its words, lines, paragraphs and sentences split once for all steps."""

import re
from collections import Counter
from functools import cached_property
from typing import Any

from data_pipeline.words import split_sentences, split_words

PARAGRAPHS = re.compile(r"\n{2,}")


class Page:
    """One document. Views of the text are computed when a step first asks for one, and dropped when the text changes.

    Args:
        text: the document's text.
        id: names the document in all pieces, quarantine and audits.
        metadata: source, version, licence, url, path, kind, date and whatever steps add.
    """

    def __init__(self, text: str, id: str, metadata: dict[str, Any]):
        self._text = text
        self.id = id
        self.metadata = metadata
        self.counts: Counter[str] = Counter()
        """What the step that judges now wants added up over all documents: label -> number."""

    @property
    def text(self) -> str:
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        if text != self._text:
            self._text = text
            for view in ("words", "lines", "paragraphs", "sentences"):
                self.__dict__.pop(view, None)

    @property
    def kind(self) -> str:
        """What the text is: "prose", "code", ..."""
        return self.metadata["kind"]

    @cached_property
    def lines(self) -> list[str]:
        """As the line feeds separate them, ends left out."""
        return self._text.split("\n")

    @cached_property
    def paragraphs(self) -> list[str]:
        """As two line feeds or more separate them, white space around the text left out."""
        return PARAGRAPHS.split(self._text.strip())

    @cached_property
    def words(self) -> list[str]:
        """Words and marks, split as English."""
        return split_words(self._text)

    @cached_property
    def sentences(self) -> list[str]:
        """Sentences with the white space before them, split as English; they add up to the text."""
        return split_sentences(self._text)
