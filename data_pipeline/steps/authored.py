"""Code that nobody of its repository wrote."""

import re
from dataclasses import dataclass, field

from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import DocumentStep, Verdict
from data_pipeline.steps.code_quality import GENERATED

VENDORED = re.compile(
    r"(?:^|/)(?:node_modules|vendor(?:ed)?|_vendor|third[_-]?party|external|deps|bower_components|dist|site-packages"
    r"|Godeps|Pods|Carthage|\.venv|venv)/|\.min\.(?:js|css)$|(?:^|/)(?:jquery|bootstrap|lodash|d3)[^/]*\.(?:js|css)$",
    re.IGNORECASE,
)
"""Paths of copies of other people's code, after the list of GitHub's Linguist."""
GENERATED_NAME = re.compile(
    r"_pb2(?:_grpc)?\.pyi?$|\.pb\.(?:go|cc|h)$|\.g\.(?:dart|cs)$|\.designer\.(?:cs|vb)$|(?:^|/)(?:parser\.tab|lex\.yy)\.[ch]$"
    r"|\.(?:bundle|generated|gen)\.\w+$|-lock\.json$|(?:^|/)(?:moc_|ui_|qrc_)\w+\.(?:cpp|h|py)$|\.map$",
    re.IGNORECASE,
)
HEAD_LINES = 10
MINIFIED = 300
"""Characters: mean length of lines that no person writes."""


@register("corpus/step", "authored")
@dataclass(frozen=True)
class Authored(DocumentStep):
    """Drop vendored files (by their path) and generated ones (by name, by what their first lines say, or minified)."""

    kinds: list[str] = field(default_factory=lambda: ["code"])

    def judge(self, page: Page) -> Verdict:
        path = page.metadata["path"]
        if VENDORED.search(path):
            return "vendored"
        head = page.text.split("\n", HEAD_LINES)[:HEAD_LINES]
        minified = len(page.text) / (page.text.count("\n") + 1) > MINIFIED
        if minified or GENERATED_NAME.search(path) or any(GENERATED.search(line[:MINIFIED]) for line in head):
            return "generated"
        return None
