"""The configuration of `python -m data_pipeline`: which data set is made, and where."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

import data_pipeline
import data_pipeline.corpus
import data_pipeline.executors
import data_pipeline.sources
import data_pipeline.steps
from conf.errors import Problem
from conf.registry import discover, register


class DataSet:
    """What can be made. Subclasses are frozen dataclasses registered with `@register("corpus", name)`."""

    def problems(self, config: "PipelineConfig", world_size: int) -> list[Problem]:
        """Everything wrong with the configuration, found before anything starts."""
        return []

    def run(self, config: "PipelineConfig", resolved: dict[str, Any]) -> int:
        """Make the artifact `config.run_dir`, or find it made; returns the exit code."""
        raise NotImplementedError


@register("", "pipeline_schema")
@dataclass(frozen=True)
class PipelineConfig:
    """Make a data set: a corpus of token shards, or conversations about tasks.

    Args:
        corpus: what is made; see the group `corpus`.
        name: the data set's name.
        run_dir: the directory that becomes the artifact.
        cache: where downloads are kept; a data set can be made again from it without a network.
        seed: of everything that is drawn.
        executor: where the pieces of a corpus are worked on; see the group `executor`; local ones if not given.
        workers: most pieces that are worked on at the same time; 0 means one per core of this machine with
            executor=local, and all of them elsewhere. The result does not depend on it.
    """

    corpus: Any = MISSING
    name: str = "corpus"
    run_dir: str = "runs/${name}"
    cache: str = ".cache"
    seed: int = 0
    executor: Any = None
    workers: int = 0

    def problems(self) -> list[Problem]:
        """Everything wrong with the configuration."""
        found = (
            []
            if self.workers >= 0
            else [Problem("workers", self.workers, "0 (as many as there are cores or pieces) or more")]
        )
        return found + (self.executor.problems() if self.executor else []) + self.corpus.problems(self, 1)


for package in (
    data_pipeline,
    data_pipeline.corpus,
    data_pipeline.executors,
    data_pipeline.sources,
    data_pipeline.steps,
):
    discover(package)
