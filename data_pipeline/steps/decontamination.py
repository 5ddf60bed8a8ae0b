"""Decontamination: what the model will be tested on is not in what it learns from."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import fingerprint
from data_pipeline.evaluation_sets import Item, read_set, set_name
from data_pipeline.overlap import Match
from data_pipeline.page import Page
from data_pipeline.steps.base import CorpusStep, Verdict

if TYPE_CHECKING:
    from data_pipeline.engine.survey import Survey

ACTIONS = ("drop", "cut")
CONTAMINATED = "contaminated"
LEAST_PIECE, MOST_PIECES = 200, 10
"""As in GPT-3: characters of a piece between cuts that is kept, and pieces of a document that is."""
FIRST_WORD, LAST_WORD = re.compile(r"\S*"), re.compile(r"\S*\Z")


@register("corpus/step", "decontamination")
@dataclass(frozen=True)
class Decontamination(CorpusStep):
    """Find evaluation items by the runs of n words that documents share with them, in lower case and without
    punctuation, and drop the documents or cut the runs out.

    Args:
        sets: files or directories with evaluation sets: JSON lines, JSON, text, artifacts of conversations; training
            splits in a directory are left out. A set is named by the end of its path.
        n: words in a run; 13 as in GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C).
        shortest: words that an item of fewer than n must have to be looked for, which is then done as a whole.
        share: least share of an item's runs that a document must have to be contaminated by it, in [0, 1]; 0 for any
            one run.
        queries: look for runs within questions too, not only in their answers.
        crossing: look for runs that begin in a question and end in its answer.
        numbers: let every number be 0, so that no number tells two texts apart.
        action: "drop" the document; or "cut" out each run with its margin, keeping the pieces between of 200 characters
            and more, and drop the document if nothing is left or it falls into more than ten.
        margin: characters cut before and after a run.
    """

    topic: ClassVar[str] = "contamination"

    sets: list[str] = field(default_factory=list)
    n: int = 13
    shortest: int = 5
    share: float = 0.0
    queries: bool = True
    crossing: bool = True
    numbers: bool = False
    action: str = "drop"
    margin: int = 200

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        if not self.sets:
            found.append(
                Problem(f"{key}.sets", "[]", "paths of the evaluation sets, or leave the step out of the order")
            )
        if len(set(self.names)) < len(self.sets):
            found.append(Problem(f"{key}.sets", ", ".join(self.names), "paths that end in different names"))
        for name, least in (("n", 1), ("shortest", 1), ("margin", 0)):
            if getattr(self, name) < least:
                found.append(Problem(f"{key}.{name}", getattr(self, name), f"at least {least}"))
        if not 0 <= self.share <= 1:
            found.append(Problem(f"{key}.share", self.share, "a share in [0, 1]"))
        if self.action not in ACTIONS:
            found.append(Problem(f"{key}.action", self.action, " or ".join(ACTIONS)))
        return found

    @property
    def names(self) -> list[str]:
        """Of the sets."""
        return [set_name(path) for path in self.sets]

    def read(self) -> dict[str, list[Item]]:
        """Name of a set -> what it asks.

        Raises:
            EvaluationSetError: a set cannot be read.
        """
        return {name: read_set(path) for name, path in zip(self.names, self.sets, strict=True)}

    def state(self) -> Any:
        """Name of each set -> its items, counted and hashed."""
        return {
            name: {"items": len(items), "hash": fingerprint([[item.query, item.labels] for item in items])}
            for name, items in self.read().items()
        }

    def survey(self, survey: "Survey") -> None:
        from data_pipeline.engine.contamination import find_contamination

        match = Match(self.n, self.shortest, self.queries, self.crossing, self.numbers, self.share)
        find_contamination(survey, self, self.read, match)

    def verdicts(self, directory: Path, rank: int) -> Callable[[int, Page], Verdict]:
        from data_pipeline.engine.contamination import contaminated

        found = contaminated(directory, rank)

        def judge(number: int, page: Page) -> Verdict:
            if number not in found:
                return None
            document = found[number]
            page.counts.update(document.counts)
            page.metadata["contaminated_by"] = document.sets
            first = page.text[slice(*document.spans[0])]
            if self.action == "cut":
                page.text = cut(page.text, document.spans, self.margin)
                if page.text:
                    return None  # without the run: later steps judge the text, not the metadata
            page.metadata["contaminated_text"] = first
            return CONTAMINATED

        return judge


def cut(text: str, spans: list[tuple[int, int]], margin: int) -> str:
    """The text without the spans and their margins, nor the words that a margin ends in; empty if too little is left,
    or in too many pieces.

    Args:
        text: the document's.
        spans: first character, and the one after the last; ascending.
        margin: characters.
    """
    pieces, begin = [], 0
    for start, end in spans:
        pieces.append(LAST_WORD.sub("", text[begin : max(begin, start - margin)]))
        begin = max(begin, end + margin)
        begin += len(FIRST_WORD.match(text, begin)[0])  # type: ignore[index]  # it matches everywhere
    pieces.append(text[begin:])
    whole = [piece.strip() for piece in pieces if len(piece.strip()) >= LEAST_PIECE]
    return "\n\n".join(whole) if len(whole) <= MOST_PIECES else ""
