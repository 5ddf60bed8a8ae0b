"""Passes over all pieces of a corpus, before a step judges any document."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data_pipeline.engine.pieces import PieceReader, execute
from data_pipeline.executors.base import Executor
from data_pipeline.executors.local import LOCAL


@dataclass(frozen=True)
class Survey:
    """What a step surveys.

    Args:
        pieces: files of documents.
        directory: for what is found; what a killed run left there is found again.
        logs: for datatrove's logs and marks of completed tasks.
        workers: most tasks at the same time; the result must not depend on it.
        executor: where they run.
    """

    pieces: Sequence[Path]
    directory: Path
    logs: Path
    workers: int
    executor: Executor = LOCAL

    def reader(self) -> PieceReader:
        """Reads piece r in task r."""
        return PieceReader(self.pieces)

    def run(self, name: str, pipeline: list[PipelineStep], tasks: int | None = None) -> dict[str, Counter[str]]:
        """One pass; a pass that was completed before a kill is not run again.

        Args:
            name: of the pass.
            pipeline: datatrove steps.
            tasks: parts of the work; as many as pieces if not given.

        Returns:
            Step name -> label -> total.
        """
        return execute(pipeline, self.logs / name, tasks or len(self.pieces), self.workers, self.executor)
