"""Searching a corpus for evaluation items: an index of them, a pass over the documents, a tally of what was found."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.evaluation_sets import Item
from data_pipeline.overlap import Index, Match
from data_pipeline.page import Page

if TYPE_CHECKING:
    from data_pipeline.engine.survey import Survey
    from data_pipeline.steps.base import Step

CHUNK = re.compile(r"\S+")
Sets = Callable[[], dict[str, list[Item]]]
"""Reads the evaluation sets, by name."""


@dataclass(frozen=True)
class Contaminated:
    """A document that holds evaluation items.

    Args:
        spans: first character, and the one after the last, of each run that it shares with them; ascending, apart.
        sets: names of the sets that the items are of.
        counts: to be added up over all documents: per set the documents, and the items found in no document before.
    """

    spans: list[tuple[int, int]]
    sets: list[str]
    counts: dict[str, int]


def find_contamination(survey: "Survey", step: "Step", sets: Sets, match: Match) -> None:
    """Leave `contaminated/`: the documents that hold evaluation items, by piece.

    Args:
        survey: of the step.
        step: whose kinds of documents are searched.
        sets: what is looked for.
        match: how.
    """
    survey.run("index", [BuildIndex(sets, match, survey.directory)], tasks=1)
    survey.run("search", [survey.reader(), Search(step, match, survey.directory)])
    survey.run("tally", [TallyItems(survey.directory)], tasks=1)


def contaminated(directory: Path, piece: int) -> dict[int, Contaminated]:
    """Number of a document in the piece -> what of the evaluation sets it holds."""
    file = directory / f"contaminated/{piece:05d}.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    return {number: Contaminated(*found) for number, *found in map(orjson.loads, lines)}


class BuildIndex(PipelineStep):
    """Writes `index/`, and in `index/sets.json` the names of the sets with the number of their items.

    Args:
        sets: what is looked for.
        match: how.
        directory: of the survey.
    """

    name = "🦠 Index"
    type = "🦠 - DECONT"

    def __init__(self, sets: Sets, match: Match, directory: Path):
        super().__init__()
        self.sets = sets
        self.match = match
        self.directory = directory

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        sets = self.sets()
        Index.of((item for items in sets.values() for item in items), self.match).save(self.directory / "index")
        sizes = {name: len(items) for name, items in sets.items()}
        (self.directory / "index/sets.json").write_bytes(orjson.dumps(sizes))
        yield from ()


class Search(PipelineStep):
    """Writes `found/<piece>.jsonl` of [number of the document, spans in characters, numbers of the items].

    Args:
        step: whose kinds of documents are searched.
        match: how items are looked for.
        directory: of the survey.
    """

    name = "🦠 Search"
    type = "🦠 - DECONT"

    def __init__(self, step: "Step", match: Match, directory: Path):
        super().__init__()
        self.step = step
        self.match = match
        self.directory = directory

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        index = Index.load(self.directory / "index", self.match)
        (self.directory / "found").mkdir(exist_ok=True)
        with open(self.directory / f"found/{rank:05d}.jsonl", "wb") as stream:
            for number, document in enumerate(data):
                if self.step.judges(Page(document.text, document.id, document.metadata)):
                    items, spans = located(index, document.text)
                    if items:
                        stream.write(orjson.dumps([number, spans, items]) + b"\n")
        yield from ()


def located(index: Index, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Numbers of the items that a text holds, and where in it, in characters: spans that touch are joined."""
    chunks = text.split()
    found = index.find(chunks)
    if not found.items:
        return [], []
    limits = [chunk.span() for chunk in CHUNK.finditer(text)]
    chunk = index.chunk_of_words(chunks)
    spans: list[tuple[int, int]] = []
    for first, end in found.spans:
        start, stop = limits[chunk[first]][0], limits[chunk[end - 1]][1]
        if spans and start <= spans[-1][1]:
            start, stop = spans[-1][0], max(stop, spans.pop()[1])
        spans.append((start, stop))
    return found.items, spans


class TallyItems(PipelineStep):
    """Writes `contaminated/<piece>.jsonl` of [number of the document, spans, names of the sets, counts].

    Args:
        directory: of the survey.
    """

    name = "🦠 Tally"
    type = "🦠 - DECONT"

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        sizes = orjson.loads((self.directory / "index/sets.json").read_bytes())
        names = np.repeat(list(sizes), list(sizes.values()))
        seen = np.zeros(len(names), dtype=bool)
        (self.directory / "contaminated").mkdir(exist_ok=True)
        for file in sorted((self.directory / "found").iterdir()):
            with open(self.directory / "contaminated" / file.name, "wb") as stream:
                for number, spans, items in map(orjson.loads, file.read_bytes().splitlines()):
                    sets = [str(name) for name in dict.fromkeys(names[items])]
                    counts = {f"{name}: documents": 1 for name in sets}
                    for item in items:
                        label = f"{names[item]}: items"
                        counts[label] = counts.get(label, 0) + int(not seen[item])
                    seen[items] = True
                    stream.write(orjson.dumps([number, spans, sets, counts]) + b"\n")
        yield from ()
