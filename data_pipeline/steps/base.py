"""Curation steps: what each is given, and what it answers.

A step is one file of this package: a frozen dataclass whose fields are its settings, registered with
`@register("corpus/step", name)` and switched on by its name in `corpus.order`.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from conf.errors import Problem
from data_pipeline.page import Page

if TYPE_CHECKING:
    from data_pipeline.engine.survey import Survey

Verdict = str | None
"""None passes a document on; a reason, in snake_case, puts it in quarantine."""
PROSE = ["prose"]
CODE = ["code"]


@dataclass(frozen=True)
class Step(ABC):
    """What all steps have.

    Args:
        gate: least share of the documents judged that must be passed on, in [0, 1]; less stops the build and shows
            examples, as more likely the step is wrong for this text than the text is bad. 0 never
            stops it as long as any document is left.
        kinds: kinds of documents that are judged, such as prose and code; others pass untouched. Empty for all.
    """

    topic: ClassVar[str] = ""
    """Section of the data card that shows what was found: duplicates, personal, contamination or representation."""
    hides: ClassVar[bool] = False
    """Whether a document that it drops goes to quarantine as the step has left it, not as it was given: what the step
    takes out must not be kept."""

    gate: float = 0.1
    kinds: list[str] = field(default_factory=list)

    def problems(self, key: str) -> list[Problem]:
        """Everything wrong with the settings; `key` is where they stand in the configuration."""
        return [] if 0 <= self.gate <= 1 else [Problem(f"{key}.gate", self.gate, "a share in [0, 1]")]

    def state(self) -> Any:
        """What decides the result beyond the settings, as JSON: hashes of files, versions of models."""
        return None

    def conclude(self, totals: Counter[str]) -> list[str]:
        """What is wrong with the counts of the whole corpus; anything stops the build.

        Args:
            totals: label -> what `Page.counts` added up to.
        """
        return []

    def __getstate__(self) -> dict[str, Any]:
        """To other processes go the settings: a model that was loaded here is loaded again there."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def judges(self, page: Page) -> bool:
        return not self.kinds or page.kind in self.kinds

    @abstractmethod
    def verdicts(self, directory: Path, rank: int) -> Callable[[int, Page], Verdict]:
        """What judges the documents of one piece, given the number of each in the piece and the document.

        Args:
            directory: where the step's survey left what it found.
            rank: number of the piece.
        """


class DocumentStep(Step):
    """Judges each document by itself: many of them run in one pass."""

    @abstractmethod
    def judge(self, page: Page) -> Verdict:
        """Pass on, change or drop one document: a function of nothing but the settings and the document.

        May set `page.text` and `page.metadata`, and add to `page.counts`.
        """

    def verdicts(self, directory: Path, rank: int) -> Callable[[int, Page], Verdict]:
        return lambda number, page: self.judge(page)


class CorpusStep(Step):
    """Must see all documents before it judges any of them, as deduplication does."""

    @abstractmethod
    def survey(self, survey: "Survey") -> None:
        """Go over all pieces, once or more, and leave what was found in `survey.directory`."""
