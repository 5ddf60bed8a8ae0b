"""Data sets of the Hugging Face hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.sources.base import Fields, Source, SourceError, kind_problems, listed

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep


@register("corpus/source", "huggingface")
@dataclass(frozen=True)
class HuggingFace(Source):
    """A data set by its name in the Hugging Face hub, or a local directory: one of data files that `datasets` can load,
    or one that `save_to_disk` wrote.

    Args:
        dataset: name, or directory.
        subset: configuration of the data set; empty for its default.
        split: split of the data set.
        revision: commit or tag; pin one, or a rerun may find other text.
        fields: columns of the text, id, date, licence and address.
        kind: what the text is: "prose" or "code".
        streaming: read rows as they come in place of downloading first.
        limit: most rows per piece; -1 reads all.
        licence: under which the text may be used, where rows do not say.
        date: when it was written or collected, as ISO 8601, where rows do not say; empty if unknown.
    """

    dataset: str = ""
    subset: str = ""
    split: str = "train"
    revision: str = ""
    fields: Fields = field(default_factory=Fields)
    kind: str = "prose"
    streaming: bool = True
    limit: int = -1
    licence: str = "not stated"
    date: str = ""

    def problems(self, key: str) -> list[Problem]:
        found = [] if self.dataset else [Problem(f"{key}.dataset", "''", "a name in the hub, or a directory")]
        return found + kind_problems(key, self.kind)

    def state(self) -> Any:
        """Of a directory, the names, sizes and times of its files; of a name in the hub, `revision` says it all."""
        if not Path(self.dataset).is_dir():
            return None
        root, names = listed(self.dataset)
        stats = [(name, (root / name).stat()) for name in names]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def readers(self, cache: Path) -> "list[PipelineStep]":
        from data_pipeline.readers.hub import HubReader
        from data_pipeline.readers.reading import Origin

        local = Path(self.dataset)
        if (local / "dataset_dict.json").exists():
            local = local / self.split
            if not local.is_dir():
                raise SourceError(f"{self.dataset} has no split {self.split}; give another as `split`.")
        saved = (local / "state.json").exists()
        options = {"split": self.split, "name": self.subset or None, "revision": self.revision or None}
        given = {name: value for name, value in options.items() if value}
        home = "" if local.is_dir() else f"pkg:huggingface/{self.dataset}@{self.revision}"
        origin = Origin(str(local) if saved else self.dataset, self.revision, self.licence, home, "", self.date)
        return [HubReader(origin, given, saved, self.streaming, self.limit, self.fields, self.kind)]
