"""Data sets of the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from conf.errors import Problem
from conf.registry import register
from data_pipeline.sources.base import Source, kind_problems

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep


@register("corpus/source", "huggingface")
@dataclass(frozen=True)
class HuggingFace(Source):
    """A data set by its name in the Hugging Face hub, or a local directory that `datasets` can load.

    Args:
        dataset: name, or directory.
        subset: configuration of the data set; empty for its default.
        split: split of the data set.
        revision: commit or tag; pin one, or a rerun may find other text.
        text_key: column that holds the text.
        kind: what the text is: "prose" or "code".
        streaming: read rows as they come in place of downloading first.
        limit: most rows per piece; -1 reads all.
        licence: under which the text may be used, for the manifest.
    """

    dataset: str = MISSING
    subset: str = ""
    split: str = "train"
    revision: str = ""
    text_key: str = "text"
    kind: str = "prose"
    streaming: bool = True
    limit: int = -1
    licence: str = "not stated"

    def problems(self, key: str) -> list[Problem]:
        return kind_problems(key, self.kind)

    def readers(self, cache: Path) -> "list[PipelineStep]":
        from data_pipeline.readers.reading import HubReader, Origin

        options = {"split": self.split, "name": self.subset or None, "revision": self.revision or None}
        given = {name: value for name, value in options.items() if value}
        origin = Origin(
            self.dataset, self.revision, self.licence, f"pkg:huggingface/{self.dataset}@{self.revision}", ""
        )
        return [HubReader(origin, given, self.streaming, self.limit, self.text_key, self.kind)]
