"""reStructuredText as a reader sees it: roles, links and labels reduced to their text."""

import re
from dataclasses import dataclass, field

from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep
from data_pipeline.steps.normalise import tidied

# Bounded, so that no text makes them slow.
ROLE = re.compile(r"(?<![\w`]):[A-Za-z][\w:+.-]{0,40}:`[~!]?([^`<]{1,300}?)(?:\s{0,9}<[^`>]{1,300}>)?`")
LINK = re.compile(r"(?<![\w`])`([^`<]{1,300}?)\s{0,9}<[^`>]{1,300}>`__?")
LITERAL = re.compile(r"``([^`\n]+)``")
LABEL = re.compile(r"^[ \t]*\.\. (?:_[^:\n]+:|(?:index|currentmodule|module|highlight|toctree)::).*\n", re.MULTILINE)


@register("corpus/step", "markup")
@dataclass(frozen=True)
class Markup(DocumentStep):
    """Reduce reStructuredText roles, links and labels to what a reader sees of them."""

    kinds: list[str] = field(default_factory=lambda: list(PROSE))

    def judge(self, page: Page) -> None:
        text = LABEL.sub("", page.text)
        page.text = tidied(LITERAL.sub(r"`\1`", LINK.sub(r"\1", ROLE.sub(r"\1", text))))
