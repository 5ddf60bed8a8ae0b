"""Between steps a corpus is a fixed number of pieces, `00000.jsonl.zst` ...: the unit of parallel work and of resuming.

The number of pieces is part of the recipe and the number of processes is not, so the result is the same on any machine.
"""

import contextlib
import fcntl
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter
from loguru import logger

from data_pipeline.executors.base import Executor
from data_pipeline.executors.local import LOCAL

ENDING = ".jsonl.zst"
MOST_NAMES = 1000
VARIOUS = "various"


class Job(LocalPipelineExecutor):
    """datatrove's way through a piece. Its logs go to files only, and a piece has one writer at a time: a process that
    outlives a killed run, on this machine or another, is waited for."""

    def __init__(self, pipeline: list[PipelineStep], logs: Path, tasks: int):
        super().__init__(pipeline, tasks, logging_dir=str(logs))
        self.directory = logs

    def complete(self, piece: int) -> bool:
        return self.is_rank_completed(piece)

    def do(self, piece: int) -> None:
        locks = self.directory / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / f"{piece:05d}", "w") as lock, contextlib.redirect_stderr(io.StringIO()):
            fcntl.flock(lock, fcntl.LOCK_EX)
            deepcopy(self)._run_for_rank(piece)


def execute(
    pipeline: list[PipelineStep], logs: Path, tasks: int, workers: int, executor: Executor = LOCAL
) -> dict[str, Counter[str]]:
    """Run a pipeline, leaving out the tasks that an earlier, cut run has completed.

    Args:
        pipeline: datatrove steps.
        logs: directory for logs, statistics and marks of completed tasks.
        tasks: pieces of the work.
        workers: most tasks at the same time.
        executor: where they run.

    Returns:
        Step name -> label -> total over all tasks, those of earlier runs included.
    """
    logger.remove()
    job = Job(pipeline, logs, tasks)
    if lacking := job.get_incomplete_ranks():
        executor.run(job, lacking, min(workers, len(lacking)))
    totals: dict[str, Counter[str]] = {}
    for rank in range(tasks):
        for step in json.loads((logs / "stats" / f"{rank:05d}.json").read_text()):
            # datatrove abbreviates a statistic that has nothing but a total
            counts = {label: s["total"] if isinstance(s, dict) else s for label, s in step["stats"].items()}
            totals.setdefault(step["name"].split(": ", 1)[1], Counter()).update(counts)
    return totals


class PieceReader(PipelineStep):
    """Reads one piece per task; a piece that nothing was written to does not exist.

    Args:
        pieces: one file per task.
    """

    name = "📖 Piece"
    type = "📖 - READER"

    def __init__(self, pieces: Sequence[Path]):
        super().__init__()
        self.pieces = pieces

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from read_piece(self.pieces[rank])


def pieces_of(directory: Path, count: int) -> list[Path]:
    """The files that the tasks of a step write."""
    return [directory / f"{rank:05d}{ENDING}" for rank in range(count)]


def read_piece(file: Path) -> Iterator[Document]:
    """The documents of one piece; none where nothing was written to it."""
    if file.exists():
        yield from (Document(**record) for record in read_records(file))


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of one file of pieces or of quarantine."""
    import zstandard

    with zstandard.open(file, "rb") as stream:
        yield from map(orjson.loads, io.BufferedReader(stream, 2**20))


class Tally(PipelineStep):
    """Counts documents and bytes under names made of their metadata.

    Names beyond the first `MOST_NAMES` of a piece are counted under their first part alone, the others being `VARIOUS`:
    documents may bring any licence of their own.

    Args:
        keys: metadata keys whose values, joined by a tab, are the name.
    """

    name = "🧮 Tally"
    type = "📊 - STATS"

    def __init__(self, keys: Sequence[str]):
        super().__init__()
        self.keys = keys

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        documents: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for doc in data:
            values = [str(doc.metadata[key]).replace("\t", " ") for key in self.keys]
            name = "\t".join(values)
            if name not in documents and len(documents) >= MOST_NAMES:
                name = "\t".join([values[0], *[VARIOUS] * (len(values) - 1)])
            documents[name] += 1
            sizes[name] += len(doc.text.encode())
            yield doc
        for name, count in documents.items():
            self.stat_update(f"documents\t{name}", value=count)
            self.stat_update(f"bytes\t{name}", value=sizes[name])


def tallied(totals: Counter[str]) -> dict[tuple[str, ...], dict[str, int]]:
    """What a Tally counted: values of its keys -> {"documents", "bytes"}."""
    found: dict[tuple[str, ...], dict[str, int]] = {}
    for label, total in totals.items():
        what, *name = label.split("\t")
        found.setdefault(tuple(name), {})[what] = total
    return found


def writer(directory: Path, filename: str = "${rank}" + ENDING) -> JsonlWriter:
    """Writes pieces."""
    return JsonlWriter(str(directory), filename, compression="zstd", adapter=_plain)


def quarantine(directory: Path) -> JsonlWriter:
    """Writes dropped documents to `<directory>/<step>/<piece>`, each with the step and the reason that it carries."""
    return JsonlWriter(str(directory), "${filter_step}/${rank}" + ENDING, compression="zstd", adapter=_labelled)


def _labelled(self: JsonlWriter, document: Document) -> dict[str, Any]:
    metadata = {key: value for key, value in document.metadata.items() if not key.startswith("filter_")}
    labels = {"step": document.metadata["filter_step"], "reason": document.metadata["filter_reason"]}
    return {**labels, "text": document.text, "id": document.id, "metadata": metadata}


def _plain(self: JsonlWriter, document: Document) -> dict[str, Any]:
    return {"text": document.text, "id": document.id, "metadata": document.metadata}
