"""Words and phrases looked for in a document's words, all in one pass."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from data_pipeline.page import Page

Label = TypeVar("Label", bound=Hashable)


class Phrases(Generic[Label]):
    """Phrases by their first word. They are split as documents are; capitals do not matter.

    Args:
        entries: (what a phrase stands for, phrase of one word or more).
    """

    def __init__(self, entries: Iterable[tuple[Label, str]]):
        self.by_first_word: dict[str, list[tuple[Label, tuple[str, ...]]]] = {}
        for label, entry in entries:
            phrase = tuple(word.lower() for word in Page(entry, "", {}).words)
            if phrase:
                self.by_first_word.setdefault(phrase[0], []).append((label, phrase))

    def places(self, words: Sequence[str]) -> Iterator[tuple[Label, int]]:
        """What is found, with the number of its first word, in order."""
        lower = [word.lower() for word in words]
        for place, word in enumerate(lower):
            for label, phrase in self.by_first_word.get(word, ()):
                if len(phrase) == 1 or tuple(lower[place : place + len(phrase)]) == phrase:
                    yield label, place
