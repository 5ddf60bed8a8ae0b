"""MinHash deduplication on one core, against datatrove's four blocks; and what it costs as a corpus grows.

Both sides read the same pieces, find near-duplicates at the same parameters, and write what is kept. Text: the sources
of the running standard library, cut into documents, some of them copied with a share of their words exchanged.
"""

import math
import multiprocessing
import random
import re
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from conf.registry import register

COPIES, EXCHANGED = 0.2, 0.06
"""Share of documents that are copies, and the most of a copy's words that are others."""
Clusters = set[frozenset[tuple[int, int]]]
"""Documents that are near-duplicates, as (piece, number in the piece)."""


@register("bench", "minhash")
@dataclass(frozen=True)
class MinHashBench:
    """Deduplicate corpora of several sizes, each in a process of its own.

    Args:
        sizes: of the corpora, in documents; the first is given to datatrove too.
        characters: of a document.
        pieces: that each corpus is cut into.
        rounds: times that both sides deduplicate the first corpus, by turns; the best of each counts.
    """

    sizes: tuple[int, ...] = (4000, 8000, 16000, 32000)
    characters: int = 1000
    pieces: int = 4
    rounds: int = 2

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it."""
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            root = Path(name)
            megabytes = [self.write(root / str(size), size) for size in self.sizes]
            first = root / str(self.sizes[0])
            sides: dict[str, list[Measured]] = {"ours": [], "datatrove": []}
            for number in range(self.rounds):
                sides["ours"].append(_alone(_ours, first, root / f"ours-{number}", self.pieces))
                sides["datatrove"].append(_alone(_datatroves, first, root / f"datatrove-{number}", self.pieces))
            best = {side: min(measured, key=lambda one: one.seconds) for side, measured in sides.items()}
            grown = [_alone(_ours, root / str(size), root / f"ours-of-{size}", self.pieces) for size in self.sizes]
        ours, theirs = best["ours"].clusters, best["datatrove"].clusters
        figures = {
            "text that both deduplicate (MB)": megabytes[0],
            "near-duplicates dropped by datatrove": sum(map(len, theirs)) - len(theirs),
            "clusters that differ": len(ours ^ theirs),
        }
        for side, measured in best.items():
            figures[f"{side} (MB/s)"] = megabytes[0] / measured.seconds
            figures[f"{side}: peak above imports (MB)"] = measured.megabytes
        figures["speed / datatrove's"] = best["datatrove"].seconds / best["ours"].seconds
        for size, measured in zip(self.sizes, grown, strict=True):
            figures[f"{size:,} documents: ours (s)"] = measured.seconds
            figures[f"{size:,} documents: peak above imports (MB)"] = measured.megabytes
        if len(self.sizes) > 1:
            figures["time grows as size to the power"] = self.exponent([measured.seconds for measured in grown])
            figures["memory grows as size to the power"] = self.exponent([measured.megabytes for measured in grown])
        return figures

    def exponent(self, costs: list[float]) -> float:
        """Slope of the costs' logarithm over that of the sizes."""
        return float(np.polyfit(np.log(self.sizes), np.log(costs), 1)[0])

    def write(self, directory: Path, size: int) -> float:
        """A corpus of so many documents in pieces; returns its text in MB."""
        from datatrove.data import Document

        from data_pipeline.engine.pieces import writer

        draw, texts, characters = random.Random(0), self.texts(size), 0
        with writer(directory) as stream:
            for number, text in enumerate(texts):
                if number and draw.random() < COPIES:
                    exchanged = draw.random() * EXCHANGED
                    words = draw.choice(texts[:number]).split(" ")
                    text = " ".join("other" if draw.random() < exchanged else word for word in words)
                characters += len(text)
                document = Document(text, f"{number:08}", metadata={"kind": "prose"})
                stream.write(document, draw.randrange(self.pieces))
        return characters / 1e6

    def texts(self, size: int) -> list[str]:
        """Different parts of the standard library."""
        texts: list[str] = []
        for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            source = file.read_text(encoding="utf-8", errors="ignore")
            texts += [source[start : start + self.characters] for start in range(0, len(source), self.characters)]
            if len(texts) >= size:
                return texts[:size]
        raise ValueError(f"the standard library holds {len(texts)} documents of {self.characters} characters")


@dataclass(frozen=True)
class Measured:
    """One deduplication.

    Args:
        clusters: what was found.
        seconds: of the processor, for all passes.
        megabytes: growth of the process's peak resident memory, in MB.
    """

    clusters: Clusters
    seconds: float
    megabytes: float


Side = Callable[[list[Path], Path], Callable[[], Clusters]]


def _alone(side: Side, corpus: Path, directory: Path, pieces: int) -> Measured:
    """A deduplication in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, side, corpus, directory, pieces).result()


def _measured(side: Side, corpus: Path, directory: Path, pieces: int) -> Measured:
    from data_pipeline.engine.pieces import pieces_of
    from data_pipeline.words import english

    english()  # imports spaCy, which both need
    before, start = _peak(), time.process_time()
    clusters = side(pieces_of(corpus, pieces), directory)
    seconds, peak = time.process_time() - start, _peak()
    return Measured(clusters(), seconds, peak - before)


def _ours(pieces: list[Path], directory: Path) -> Callable[[], Clusters]:
    """Deduplicate; returns what reads the clusters found."""
    from data_pipeline.engine.chain import Curate
    from data_pipeline.engine.duplicates import clusters_of, id_of
    from data_pipeline.engine.pieces import PieceReader, execute, writer
    from data_pipeline.engine.survey import Survey
    from data_pipeline.steps.minhash import MinHashStep

    step, survey = MinHashStep(), directory / "survey"
    step.survey(Survey(pieces, survey, directory / "logs", workers=1))
    keep = Curate({"minhash": step}, survey, directory / "dropped")
    execute([PieceReader(pieces), keep, writer(directory / "kept")], directory / "logs/keep", len(pieces), 1)

    def clusters() -> Clusters:
        members = defaultdict(set)
        for piece in range(len(pieces)):
            if clusters_of(survey, piece).exists():
                for number, _, kept in map(orjson.loads, clusters_of(survey, piece).read_bytes().splitlines()):
                    members[kept or id_of(survey, piece, number)].add((piece, number))
        return set(map(frozenset, members.values()))

    return clusters


def _datatroves(pieces: list[Path], directory: Path) -> Callable[[], Clusters]:
    """As `_ours`, by datatrove's blocks."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )

    from data_pipeline.engine.pieces import PieceReader, execute, writer

    config = MinhashConfig()
    signatures, buckets, found = (str(directory / name) for name in ("signatures", "buckets", "found"))
    passes = [
        ([PieceReader(pieces), MinhashDedupSignature(signatures, config)], len(pieces)),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ([MinhashDedupCluster(buckets, found, config, save_cluster_id=True)], 1),
        ([PieceReader(pieces), MinhashDedupFilter(found), writer(directory / "kept")], len(pieces)),
    ]
    for number, (pipeline, tasks) in enumerate(passes):
        execute(pipeline, directory / f"logs/{number}", tasks, 1)

    def clusters() -> Clusters:
        members = defaultdict(set)
        for piece in range(len(pieces)):
            if (file := Path(found) / f"{piece:06}.clusters").exists():
                for number, cluster in np.fromfile(file, dtype="<u4").reshape(-1, 2).tolist():
                    members[cluster].add((piece, number))
        return set(map(frozenset, members.values()))

    return clusters


def _peak() -> float:
    """Peak resident memory in MB, as the kernel counts it since the program began: getrusage has the parent's too."""
    kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes[1]) * 1024 / 1e6 if kilobytes else math.nan
