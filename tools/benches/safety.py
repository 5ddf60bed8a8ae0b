"""Speed of the steps for encodings, language, addresses, code, personal data, toxicity, representation and perplexity.

Each beside datatrove's block on the same documents, where there is one; by turns, best of several rounds. datatrove's
block for personal data knows e-mail and IP addresses alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import DocumentStep
from tools.yardstick import language_filter

ADDRESSES = 10_000
"""Documents of the bench of addresses, whose texts do not matter."""
ADDRESS = "https://docs.python.org/3/library/{}.html"


@register("bench", "safety")
@dataclass(frozen=True)
class SafetyBench:
    """Judge documents of the standard library: prose of its documentation, and its code.

    Args:
        rounds: times that each side runs; the best counts.
    """

    rounds: int = 3

    def run(self) -> dict[str, float]:
        """Measure; returns MB/s (of addresses: documents/s) by step, and the ratio to datatrove's block."""
        from data_pipeline.steps.code_quality import CodeQuality
        from data_pipeline.steps.ftfy import Ftfy
        from data_pipeline.steps.language import Language
        from data_pipeline.steps.pii import PII
        from data_pipeline.steps.representation import Representation
        from data_pipeline.steps.toxicity import Toxicity
        from data_pipeline.steps.url import Url

        prose, code = documents()
        theirs = yardsticks()
        rest = PII(secret="keep", iban="keep", card="keep", national_id="keep", phone="keep")
        steps: list[tuple[str, DocumentStep]] = [
            ("ftfy", Ftfy()),
            ("language", Language(threshold=0)),
            ("url", Url(domains=["example.com"], words=["casino"], soft_words=["free"], parts=["spam"])),
            ("pii", PII()),
            ("pii, e-mail and IP", rest),
            ("toxicity, words split", Toxicity()),
            ("representation, words split", Representation()),
            ("perplexity, n-grams", trained(prose)),
            ("code_quality", CodeQuality()),
        ]
        figures = {}
        for name, step in steps:
            texts = code if name == "code_quality" else ["text"] * ADDRESSES if name == "url" else prose
            amount = ADDRESSES if name == "url" else sum(len(text.encode()) for text in texts) / 1e6
            best, best_other = float("inf"), float("inf")
            for _ in range(self.rounds):
                pages = [Page(text, "", metadata(number)) for number, text in enumerate(texts)]
                if "words split" in name:
                    assert all(page.words for page in pages)  # split once for all steps
                best = min(best, seconds(partial(judged, step, pages)))
                if name in theirs:
                    best_other = min(best_other, seconds(partial(theirs[name], texts)))
            figures[f"{name}: {'documents/s' if name == 'url' else 'MB/s'}"] = amount / best
            if name in theirs:
                figures[f"{name}: speed / datatrove's"] = best_other / best
        return figures


def judged(step: DocumentStep, pages: list[Page]) -> None:
    for page in pages:
        step.judge(page)


def documents() -> tuple[list[str], list[str]]:
    """Prose and code."""
    import sysconfig
    from pathlib import Path
    from pydoc_data.topics import topics

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return list(topics.values()), [text for file in files if (text := file.read_text(errors="replace"))]


def metadata(number: int) -> dict[str, Any]:
    return {"url": ADDRESS.format(number), "source": "python", "kind": "prose"}


def trained(texts: list[str]) -> DocumentStep:
    """A step whose model is trained on half of the documents, and in memory."""
    import tempfile
    from pathlib import Path

    from data_pipeline.ngram import FILE, train
    from data_pipeline.steps.perplexity import Perplexity

    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        train(texts[::2], order=6).save(Path(directory) / FILE)
        step = Perplexity(model=directory)
        step.judge(Page("loads the model", "", {}))
    return step


def yardsticks() -> dict[str, Callable[[list[str]], object]]:
    """datatrove's blocks for the same work."""
    from datatrove.data import Document
    from datatrove.pipeline.filters.url_filter import URLFilter
    from datatrove.pipeline.formatters.ftfy import FTFYFormatter
    from datatrove.pipeline.formatters.pii import PIIFormatter
    from tldextract import TLDExtract

    language = language_filter()
    url = URLFilter(
        extra_domains=["example.com"],
        banned_words=["casino"],
        soft_banned_words=["free"],
        banned_subwords=["spam"],
        use_integrated_lists=False,
    )
    url.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)
    mend, hide = FTFYFormatter(), PIIFormatter()

    def filtered(judge: Callable[[Document], Any]) -> Callable[[list[str]], object]:
        return lambda texts: [judge(Document(text, str(n), metadata=metadata(n))) for n, text in enumerate(texts)]

    return {
        "ftfy": lambda texts: [mend.format(text) for text in texts],
        "language": filtered(language.filter),
        "url": filtered(url.filter),
        "pii, e-mail and IP": lambda texts: [hide.format(text) for text in texts],
    }


def seconds(work: Callable[[], object]) -> float:
    """Of processor time: what else runs on the machine does not count."""
    begin = time.process_time()
    work()
    return time.process_time() - begin
