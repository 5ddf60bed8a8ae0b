"""The English curation pass on one core, against datatrove's blocks; and what a second process adds.

Both sides judge the same documents by the same steps in the same order, each in a process of its own that has read
nothing before: language, Gopher repetition and quality, C4, FineWeb, MinHash signatures, e-mail and IP addresses. Text:
paragraphs of sentences from the docstrings of the Python packages installed here, module by module.
"""

import hashlib
import multiprocessing
import random
import re
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

from conf.registry import register
from tools.yardstick import language_filter

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
PARAGRAPHS = re.compile(r"\n\s*\n")
PROSE = re.compile(r"[A-Z].{78,}[.!?]")
LEAST_CHARACTERS = 500
"""Modules that say less are left out."""
WARM_UP = "This is what is read first, so that libraries and models are loaded before time is taken. " * 20
LONGEST_WAIT_S = 300
"""For the other processes."""
MEETING: Barrier
"""Of processes that begin at the same time."""
Judge = tuple[str, Callable[[Any], str | bytes | None]]
"""Name of a step, and what it says of a document: None, the reason for dropping it, or the bytes of its signature."""


@register("bench", "curation")
@dataclass(frozen=True)
class CurationBench:
    """Judge documents by our steps and by datatrove's blocks. Speeds are per second of the processor, so that what else
    runs on the machine changes them little; scaling is by the clock.

    Args:
        megabytes: of text, in MB.
        rounds: times that each side judges them, by turns; the best of each counts.
        processes: that share the documents where scaling is measured.
    """

    megabytes: float = 10.0
    rounds: int = 2
    processes: int = 2

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it."""
        texts = self.texts()
        size = sum(map(len, texts)) / 1e6
        ours, theirs, shared = [], [], []
        for _ in range(self.rounds):
            ours += _alone(_ours, [texts])
            theirs += _alone(_datatroves, [texts])
            shares = [texts[number :: self.processes] for number in range(self.processes)]
            shared.append(max(measured.wall for measured in _alone(_ours, shares)))
        best, other = (min(side, key=lambda measured: measured.seconds) for side in (ours, theirs))
        alone = min(measured.wall for measured in ours)
        figures = {
            "text (millions of characters)": size,
            "documents": len(texts),
            "documents kept": sum(answer.startswith("kept") for answer in other.answers),
            "documents judged otherwise": sum(a != b for a, b in zip(best.answers, other.answers, strict=True)),
            "ours (MB/s)": size / best.seconds,
            "datatrove (MB/s)": size / other.seconds,
            "speed / datatrove's": other.seconds / best.seconds,
        }
        for name in other.steps:
            figures[f"{name}: speed / datatrove's"] = other.steps[name] / best.steps[name]
            figures[f"{name}: share of our time"] = best.steps[name] / best.seconds
        figures[f"{self.processes} processes: speed by the clock / one's"] = alone / min(shared)
        return figures

    def texts(self) -> list[str]:
        """Docstrings of modules, those that are drawn first until they are enough."""
        roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}
        files = sorted({file for root in roots for file in root.rglob("*.py")})
        random.Random(0).shuffle(files)
        found: list[str] = []
        size = 0
        for file in files:
            said = DOCSTRING.findall(file.read_text(encoding="utf-8", errors="replace"))
            paragraphs = [" ".join(part.split()) for text in said for part in PARAGRAPHS.split(text)]
            text = "\n\n".join(filter(PROSE.fullmatch, paragraphs))
            if len(text) >= LEAST_CHARACTERS:
                found.append(text)
                size += len(text)
            if size >= self.megabytes * 1e6:
                break
        return found


@dataclass(frozen=True)
class Measured:
    """One pass over some documents.

    Args:
        answers: for each document: step and reason that dropped it, or "kept" and its signature.
        seconds: of the processor, for the pass.
        wall: seconds by the clock.
        steps: seconds of the processor for each step.
    """

    answers: list[str]
    seconds: float
    wall: float
    steps: dict[str, float]


Side = Callable[[], tuple[Callable[[str], Any], list[Judge]]]
"""Makes what turns a text into a document, and the judges."""


def _alone(side: Side, shares: Sequence[list[str]]) -> list[Measured]:
    """Passes in new processes, one for each share of the documents, that begin at the same time."""
    context = multiprocessing.get_context("spawn")
    meeting = context.Barrier(len(shares))
    with ProcessPoolExecutor(len(shares), context, initializer=_meet_at, initargs=(meeting,)) as pool:
        return list(pool.map(_measure, [side] * len(shares), shares))


def _meet_at(meeting: Barrier) -> None:
    global MEETING
    MEETING = meeting


def _measure(side: Side, texts: list[str]) -> Measured:
    document, judges = side()
    for _, judge in judges:
        judge(document(WARM_UP))
    answers: list[str] = []
    spent: dict[str, float] = dict.fromkeys((name for name, _ in judges), 0.0)
    MEETING.wait(LONGEST_WAIT_S)
    start, begin = time.perf_counter(), time.process_time()
    last = begin
    for text in texts:
        each = document(text)
        answer = "kept"
        for name, judge in judges:
            said = judge(each)
            now = time.process_time()
            spent[name] += now - last
            last = now
            if isinstance(said, bytes):
                answer += hashlib.sha256(said).hexdigest()
            elif said is not None:
                answer = f"{name}: {said}"
                break
        answers.append(answer)
    return Measured(answers, time.process_time() - begin, time.perf_counter() - start, spent)


def _ours() -> tuple[Callable[[str], Any], list[Judge]]:
    from data_pipeline.page import Page
    from data_pipeline.shingles import MinHash, simplified_words
    from data_pipeline.steps.c4 import C4
    from data_pipeline.steps.fineweb import FineWeb
    from data_pipeline.steps.gopher_quality import GopherQuality
    from data_pipeline.steps.gopher_repetition import GopherRepetition
    from data_pipeline.steps.language import Language
    from data_pipeline.steps.pii import PII

    minhash = MinHash()

    def sign(page: Page) -> bytes:
        signature = minhash.signature(simplified_words().of(page.text))
        return b"" if signature is None else signature.tobytes()

    addresses = PII(secret="keep", iban="keep", card="keep", national_id="keep", phone="keep")
    return lambda text: Page(text, "", {"kind": "prose"}), [
        ("language", Language(languages=["en"]).judge),
        ("gopher_repetition", GopherRepetition().judge),
        ("gopher_quality", GopherQuality().judge),
        ("c4", C4().judge),
        ("fineweb", FineWeb().judge),
        ("minhash", sign),
        ("pii", addresses.judge),
    ]


def _datatroves() -> tuple[Callable[[str], Any], list[Judge]]:
    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
    from datatrove.pipeline.formatters import PIIFormatter

    blocks: list[BaseFilter] = [
        language_filter(["en"]),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(),
        FineWebQualityFilter(),
    ]
    names = ["language", "gopher_repetition", "gopher_quality", "c4", "fineweb"]
    minhash, addresses = MinhashDedupSignature("memory://signatures"), PIIFormatter()

    def judging(name: str, block: BaseFilter) -> Judge:
        def judge(document: Document) -> str | None:
            kept, reason = get_filter_result(block.filter(document))
            return None if kept else reason or name

        return name, judge

    def sign(document: Document) -> bytes:
        shingles = minhash.get_shingles(document.text)
        return np.array(minhash.get_signature(shingles), np.uint64).tobytes() if shingles.size else b""

    def replace(document: Document) -> None:
        document.text = addresses.format(document.text)

    judges = [judging(name, block) for name, block in zip(names, blocks, strict=True)]
    return lambda text: Document(text, ""), [*judges, ("minhash", sign), ("pii", replace)]
