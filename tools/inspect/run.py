"""The samples of a training run: which one comes when, what it holds, and from which documents.

The order of a run is a function of its settings, so this asks the same code that feeds a run, and needs nothing of the
run but its `config.yaml`: samples that are yet to come are shown like those that were seen.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from conf.checkpoints import CHECKPOINTS
from conf.registry import OPTIONS
from data_pipeline.artifact import MANIFEST, Artifact
from data_pipeline.batch import MicroBatch, Samples, Span
from data_pipeline.loader import Loader
from data_pipeline.mixture import Mixture, Origin
from data_pipeline.order import order_of
from data_pipeline.shards import Shard
from data_pipeline.text import TextWindows
from data_pipeline.tokenizer import Tokenizer
from tools.inspect.errors import InspectError
from train.checkpoint.committed import TRAINER, path_of, steps
from train.models import hf
from train.rundir import CONFIG

CHUNK = 2**16
"""Positions whose samples are computed together."""


@dataclass(frozen=True)
class Part:
    """What of a document stands in a sample.

    Args:
        span: its tokens.
        id: of the document: that of a corpus that lists its documents, or file and line of a record; else empty.
        source: where it comes from.
        licence: of the source.
        length: tokens of the whole document; 0 where it is a record.
    """

    span: Span
    id: str
    source: str
    licence: str
    length: int


class Run:
    """A training run, seen from its data.

    Args:
        directory: of the run.

    Raises:
        InspectError: its data are not those that it was trained on, or it has none.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(directory / CONFIG))  # type: ignore[assignment]
        self.artifact = Artifact.read(directory) if (directory / MANIFEST).exists() else None
        self.data = option("data", self.config["data"])
        self.seed = int(self.config["seed"])
        self.global_batch = int(self.config["stage"]["global_batch"])
        self.steps = int(self.config["stage"]["steps"])
        self.samples: Samples = self.data.open("train", self.tokenizer, self.seed)
        if self.trained_on not in (None, self.samples.fingerprint):
            raise InspectError(
                f"{directory} was trained on other samples ({self.trained_on}) than its data hold now "
                f"({self.samples.fingerprint}): they were made anew since. Make them again as they were, or train anew."
            )

    @cached_property
    def trained_on(self) -> str | None:
        """Fingerprint of the samples, from the manifest, or the newest checkpoint that tells it; None before the first
        checkpoint."""
        if self.artifact:
            return self.artifact.facts.get("fingerprints", {}).get("samples")
        checkpoints = self.directory / CHECKPOINTS
        for step in reversed(steps(checkpoints)):
            try:
                return json.loads((path_of(checkpoints, step) / TRAINER).read_text())["inputs"]["samples"]
            except (OSError, ValueError, KeyError):
                continue  # damaged: a start would pass it over, too
        return None

    @cached_property
    def paths(self) -> list[Path]:
        """Of the artifacts that are read."""
        return [Path(path) for path in (getattr(self.data, "corpora", None) or {"data": self.data.path}).values()]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data's own, else that of the model that the run began with."""
        for path in self.paths:
            if (path / "tokenizer").is_dir():
                return Tokenizer.load(path / "tokenizer")
        return Tokenizer.load(hf.model_directory(self.config["init_from"]))

    def micro_batch(self, k: int) -> MicroBatch:
        """Sample k as the run is given it; a preference is two sequences.

        Raises:
            InspectError: the run has no such sample.
        """
        last = self.steps * self.global_batch - 1
        if not 0 <= k <= last:
            raise InspectError(f"sample {k} is not among the samples 0 to {last} of {self.directory}.")
        objective = option("objective", self.config["objective"])
        with Loader(
            self.samples,
            global_batch=1,
            micro_batches=1,
            dp_rank=0,
            dp_size=1,
            seed=self.seed,
            prepare=lambda batch: objective.prepare(batch, self.seed, self.tokenizer),
        ) as loader:
            (micro_batch,) = loader.batch(k)
        return micro_batch

    def origin(self, k: int) -> Origin:
        """Where sample k comes from; without spans where its documents are not those of a corpus."""
        if isinstance(self.samples, Mixture):
            return self.samples.origin(k)
        index = order_of(self.samples, self.seed)[k]
        spans = self.samples.spans(index) if hasattr(self.samples, "spans") else []
        return Origin("", k // len(self.samples), index, spans, self.config["data"]["sequence_length"])

    def part(self, span: Span) -> Part:
        from data_pipeline.engine.documents import row_of

        stem = Path(span.source)
        if stem.suffix == ".jsonl":
            return Part(span, f"{stem}:{span.document + 1}", "", "", 0)
        length = int(Shard(stem).lengths_D[span.document])
        row = row_of(stem, span.document) or ("", "", "")
        return Part(span, row[0], row[1], row[2], length)

    def step(self, number: int) -> range:
        """The samples of a step, over all ranks; steps are numbered from 1, as the logs do.

        Raises:
            InspectError: the run has no such step.
        """
        if not 1 <= number <= self.steps:
            raise InspectError(f"step {number} is not among the steps 1 to {self.steps} of {self.directory}.")
        return range((number - 1) * self.global_batch, number * self.global_batch)

    def seen(self, stem: Path, document: int) -> Iterator[int]:
        """Positions at which the run sees a document of a shard, in order."""
        texts = self.samples.sources if isinstance(self.samples, Mixture) else [self.samples]
        windows = {place: text.windows for place, text in enumerate(texts) if isinstance(text, TextWindows)}
        total = self.steps * self.global_batch
        for first in range(0, total, CHUNK):
            ks_N = np.arange(first, min(first + CHUNK, total))
            sources_N, indices_N = self._drawn(ks_N)
            for place, held in windows.items():
                if held.shard.stem != stem:
                    continue
                around = held.around(document)
                near_N = (sources_N == place) & (indices_N >= around.start) & (indices_N < around.stop)
                for k in ks_N[near_N].tolist():
                    if any(span.document == document for span in self.origin(k).spans):
                        yield k

    def _drawn(self, ks_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and number of the samples at these positions."""
        if isinstance(self.samples, Mixture):
            return self.samples.drawn(ks_N)
        return np.zeros_like(ks_N), order_of(self.samples, self.seed)[ks_N]


def option(group: str, values: dict[str, Any]) -> Any:
    """An option of a group, as a run's `config.yaml` has it.

    Raises:
        InspectError: the run was made by code that names no options, or others.
    """
    fields = {key: value for key, value in values.items() if key != "option"}
    kind = OPTIONS.get((group, values.get("option", "")))
    if kind is None:
        raise InspectError(f"{CONFIG} names no known option of {group}: {values.get('option')!r}.")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), fields))
