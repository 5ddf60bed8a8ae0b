"""Finding what occurs more than once in a corpus that does not fit in memory.

What is compared are 128-bit digests. `Sign` writes those of each piece, sorted, in runs of bounded length; each task of
`Find` merges one range of values of all runs; `Cluster` joins the documents that share a digest. datatrove's own blocks
merge the files of all pieces record by record in Python, and hold every duplicate in a dictionary.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.page import Page

if TYPE_CHECKING:
    from data_pipeline.engine.survey import Survey
    from data_pipeline.steps.base import Step

RUN = 2**18
"""Occurrences that are sorted at a time by whoever signs a piece."""
PART = 2**21
"""Occurrences, on average, that a task of `Find` holds: some 200 MB."""
WITHIN, NUMBER = np.uint64(32), np.uint64(2**32 - 1)
"""A place is the number of its document in the piece << WITHIN | the position in the document."""
Digests = Callable[[Page], Iterable[tuple[int, list[bytes]]]]
"""Page -> position in it, and one digest per band."""


def find_repeats(survey: "Survey", step: "Step", digests: Digests, bands: int = 1) -> None:
    """Leave `repeats/`: every occurrence but the first of its digest, with the first.

    Args:
        survey: of the step.
        step: whose kinds of documents are compared.
        digests: what of a document is compared.
        bands: digests at each position; two occurrences are compared band by band.
    """
    runs, repeats = survey.directory / "runs", survey.directory / "repeats"
    survey.run("sign", [survey.reader(), Sign(step, digests, bands, survey.directory)])
    occurrences = sum(np.load(file, mmap_mode="r").shape[2] for file in runs.iterdir())
    tasks = max(1, math.ceil(bands * occurrences / PART))
    survey.run("find", [Find(runs, repeats, bands)], tasks=tasks)


def find_clusters(survey: "Survey", step: "Step", digests: Digests, bands: int = 1) -> None:
    """Leave `clusters/`: the documents that share a digest with another, by piece. Arguments as of `find_repeats`."""
    find_repeats(survey, step, digests, bands)
    survey.run("cluster", [Cluster(survey.directory)], tasks=1)


class Sign(PipelineStep):
    """Writes `runs/<piece>-<run>.npy`, of uint64 (3: halves of the digest, place; bands; occurrences), and the ids.

    Args:
        step: whose kinds of documents are compared.
        digests: what of a document is compared.
        bands: digests at each position.
        directory: of the survey.
    """

    name = "🫂 Sign"
    type = "🫂 - DEDUP"

    def __init__(self, step: "Step", digests: Digests, bands: int, directory: Path):
        super().__init__()
        self.step = step
        self.digests = digests
        self.bands = bands
        self.directory = directory

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for name in ("runs", "ids"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        digests, places, offsets, runs = bytearray(), array("Q"), array("Q", [0]), 0
        with open(self.directory / f"ids/{rank:05d}", "wb") as ids:
            for number, document in enumerate(data):
                ids.write(document.id.encode("utf-8", "surrogatepass"))
                offsets.append(ids.tell())
                page = Page(document.text, document.id, document.metadata)
                for position, bands in self.digests(page) if self.step.judges(page) else ():
                    digests += b"".join(bands)
                    places.append(number << 32 | position)
                if len(places) >= RUN:
                    self._save(digests, places, rank, runs)
                    digests, places, runs = bytearray(), array("Q"), runs + 1
        self._save(digests, places, rank, runs)
        np.save(self.directory / f"ids/{rank:05d}.npy", np.asarray(offsets))
        yield from ()

    def _save(self, digests: bytearray, places: "array[int]", rank: int, number: int) -> None:
        halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, self.bands, 2)
        run = np.empty((3, self.bands, len(places)), dtype=np.uint64)
        for band in range(self.bands):
            high, low = halves[:, band].T
            order = np.lexsort((low, high))
            run[:, band] = high[order], low[order], np.asarray(places)[order]
        np.save(self.directory / f"runs/{rank:05d}-{number:05d}.npy", run)


class Find(PipelineStep):
    """Merges the runs: each task an equal part of the digests of all bands, band by band.

    Writes `<repeats>/<task>.npy`, of uint64 (4: piece and place of a repeated occurrence, piece and place of the first;
    repeats), ordered by piece and place. The first is the one in the first document of its piece, then in the first
    piece, as in datatrove's merge.

    Args:
        runs: what `Sign` wrote.
        repeats: directory for what is found.
        bands: digests at each position.
    """

    name = "🫂 Find"
    type = "🫂 - DEDUP"

    def __init__(self, runs: Path, repeats: Path, bands: int):
        super().__init__()
        self.runs = runs
        self.repeats = repeats
        self.bands = bands

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.repeats.mkdir(parents=True, exist_ok=True)
        begin, end = (2**64 * self.bands * limit // world_size for limit in (rank, rank + 1))
        found = [np.empty((4, 0), dtype=np.uint64)]
        for band in range(begin >> 64, (end - 1 >> 64) + 1):
            lowest, highest = max(begin - (band << 64), 0), min(end - 1 - (band << 64), 2**64 - 1)
            found.append(self._repeats(band, np.uint64(lowest), np.uint64(highest)))
        repeats = np.concatenate(found, axis=1)
        np.save(self.repeats / f"{rank:05d}.npy", repeats[:, np.lexsort((repeats[1], repeats[0]))])
        yield from ()

    def _repeats(self, band: int, lowest: np.uint64, highest: np.uint64) -> np.ndarray:
        """Repeats and firsts among the digests of a band whose high half is in a range, its ends included."""
        slices = [np.empty((4, 0), dtype=np.uint64)]
        for file in sorted(self.runs.iterdir()):
            run = np.load(file, mmap_mode="r")[:, band]
            start, end = np.searchsorted(run[0], lowest), np.searchsorted(run[0], highest, side="right")
            piece = np.full((1, end - start), int(file.stem.split("-")[0]), dtype=np.uint64)
            slices.append(np.concatenate([run[:, start:end], piece]))
        high, low, place, piece = np.concatenate(slices, axis=1)
        order = np.lexsort((place, piece, place >> WITHIN, low, high))
        high, low, occurrences = high[order], low[order], np.stack([piece[order], place[order]])
        repeated = np.append(False, (high[1:] == high[:-1]) & (low[1:] == low[:-1]))[: len(high)]
        firsts = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(high))))
        return np.concatenate([occurrences[:, repeated], occurrences[:, firsts[repeated]]])


class Cluster(PipelineStep):
    """Documents that share a digest with one of a cluster belong to it. Of each cluster the document whose id comes
    first in the order of code points is kept, whatever the pieces and processes.

    Writes `clusters/<piece>.jsonl` of [number of the document, documents in its cluster, id of the one kept], the last
    being null for the one that is kept itself.

    Args:
        directory: of the survey.
    """

    name = "🫂 Cluster"
    type = "🫂 - DEDUP"

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        documents = np.empty(0, dtype=np.uint64)
        for pairs in self._pairs():
            documents = np.union1d(documents, pairs)
        parents = np.arange(len(documents))
        for pairs in self._pairs():
            join(parents, *np.searchsorted(documents, pairs))
        tops = roots(parents, np.arange(len(documents)))
        _, clusters, sizes = np.unique(tops, return_inverse=True, return_counts=True)
        members = list(zip(documents.tolist(), clusters.tolist(), strict=True))
        kept: dict[int, tuple[str, int]] = {}
        for document, cluster in members:
            named = (id_of(self.directory, document >> 32, document & 2**32 - 1), document)
            kept[cluster] = min(named, kept.get(cluster, named))
        (self.directory / "clusters").mkdir(exist_ok=True)
        for piece, of_piece in groupby(members, key=lambda member: member[0] >> 32):
            with open(clusters_of(self.directory, piece), "wb") as stream:
                for document, cluster in of_piece:
                    name, best = kept[cluster]
                    of = None if best == document else name
                    stream.write(orjson.dumps([document & 2**32 - 1, int(sizes[cluster]), of]) + b"\n")
        yield from ()

    def _pairs(self) -> Iterator[np.ndarray]:
        """Of each task of `Find` the pairs of documents that share a digest, as piece << WITHIN | number: 2 x pairs."""
        for file in sorted((self.directory / "repeats").iterdir()):
            piece, place, first_piece, first_place = np.load(file)
            yield np.stack([piece << WITHIN | place >> WITHIN, first_piece << WITHIN | first_place >> WITHIN])


def clusters_of(directory: Path, piece: int) -> Path:
    return directory / f"clusters/{piece:05d}.jsonl"


def judge_copies(directory: Path, piece: int, reason: str) -> Callable[[int, Page], str | None]:
    """Verdicts of a step that left `clusters/`. A document that is dropped says in `duplicate_of` of which; one that is
    kept says under the reason, in the plural, how many were dropped for it.

    Args:
        directory: of the survey.
        piece: whose documents are judged.
        reason: for dropping all of a cluster but one.
    """
    file = clusters_of(directory, piece)
    lines = file.read_bytes().splitlines() if file.exists() else []
    clusters = {number: (size, kept) for number, size, kept in map(orjson.loads, lines)}

    def judge(number: int, page: Page) -> str | None:
        if number not in clusters:
            return None
        size, kept = clusters[number]
        if kept is None:
            page.metadata[reason + "s"] = size - 1
            return None
        page.metadata["duplicate_of"] = kept
        return reason

    return judge


def repeats_in(directory: Path, piece: int) -> np.ndarray:
    """What `Find` found in one piece, in order of place: uint64 (3: place, piece and place of the first; repeats)."""
    found = [np.empty((3, 0), dtype=np.uint64)]
    for file in sorted((directory / "repeats").iterdir()):
        repeats = np.load(file, mmap_mode="r")
        start, end = np.searchsorted(repeats[0], np.array([piece, piece + 1], dtype=np.uint64))
        found.append(np.asarray(repeats[1:, start:end]))
    joined = np.concatenate(found, axis=1)
    return joined[:, np.argsort(joined[0], kind="stable")]


def id_of(directory: Path, piece: int, number: int) -> str:
    """The id of a document that was signed."""
    offsets = _offsets(directory, piece)
    with open(directory / f"ids/{piece:05d}", "rb") as stream:
        stream.seek(int(offsets[number]))
        return stream.read(int(offsets[number + 1] - offsets[number])).decode("utf-8", "surrogatepass")


@lru_cache(16)
def _offsets(directory: Path, piece: int) -> np.ndarray:
    return np.load(directory / f"ids/{piece:05d}.npy", mmap_mode="r")


def join(parents: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Join the trees of pairs of nodes: of two roots, the larger gets the smaller as its parent."""
    while len(one):
        one, other = roots(parents, one), roots(parents, other)
        differ = one != other
        one, other = np.minimum(one, other)[differ], np.maximum(one, other)[differ]
        parents[other] = one  # of several parents of a root one stays; the other pairs come again


def roots(parents: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node; shortens the way there."""
    while True:
        above = parents[nodes]
        higher = parents[above]
        if np.array_equal(above, higher):
            return above
        parents[nodes] = higher
        nodes = higher
