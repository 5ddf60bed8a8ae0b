"""datatrove's language filter to compare with: on the model that a package brings, without a download."""

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.steps.language import Language

if TYPE_CHECKING:
    from datatrove.pipeline.filters import LanguageFilter


class Model:
    """fastText as datatrove expects it, whichever of its two distributions is installed: scores are an array."""

    def __init__(self) -> None:
        from fasttext.FastText import _FastText

        self.fasttext = _FastText(str(Language().file))

    def predict(self, text: str, k: int) -> tuple[tuple[str, ...], np.ndarray]:
        labels, scores = self.fasttext.predict(text, k=k)
        return labels, np.asarray(scores)


def language_filter(languages: list[str] | None = None, threshold: float = 0.65) -> "LanguageFilter":
    """Keeps documents in these languages, or in any."""
    from datatrove.pipeline.filters import LanguageFilter

    LanguageFilter._requires_dependencies = []  # it asks for one of the distributions by name
    found = LanguageFilter(languages, threshold)
    found.model._model = Model()
    return found
