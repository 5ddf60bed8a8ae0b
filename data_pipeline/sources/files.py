"""Local files: prose, code and JSON lines."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from conf.errors import Problem
from conf.registry import register
from data_pipeline.sources.base import CODE, PROSE, Source, SourceError, kind_problems, listed

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@register("corpus/source", "files")
@dataclass(frozen=True)
class Files(Source):
    """Local files: prose, code, and JSON lines (plain, .gz or .zst) with one document a line.

    Args:
        paths: directories, searched through, or single files.
        prose: endings of files read as natural language.
        code: endings of files read as code.
        exclude: shell patterns of paths, beginning with "/" at the directory given, that are left out.
        text_key: field of JSON records that holds the text.
        kind: what JSON records hold: "prose" or "code".
        licence: under which the text may be used, for the manifest.
    """

    paths: list[str] = MISSING
    prose: list[str] = field(default_factory=lambda: list(PROSE))
    code: list[str] = field(default_factory=lambda: list(CODE))
    exclude: list[str] = field(default_factory=lambda: ["*/.*"])
    text_key: str = "text"
    kind: str = "prose"
    licence: str = "not stated"

    def problems(self, key: str) -> list[Problem]:
        found = (
            [] if self.paths else [Problem(f"{key}.paths", "[]", "files or directories, such as corpus.paths=[notes/]")]
        )
        return found + kind_problems(key, self.kind)

    def _found(self) -> list[tuple[str, Path, list[tuple[str, str]]]]:
        """(path as given, directory, [(name in the directory, "prose" | "code" | "records")])"""
        from data_pipeline.readers.reading import Selection

        selection = Selection(tuple(self.prose), tuple(self.code), tuple(self.exclude))
        found = []
        for path in self.paths:
            root, names = listed(path)
            names = [name for name in names if not selection.excludes(name)]
            kinds = ((name, "records" if name.endswith(JSON_LINES) else selection.kind(name)) for name in names)
            files = [(name, kind) for name, kind in kinds if kind]
            if not files:
                endings = ", ".join([*self.prose, *self.code, *JSON_LINES])
                raise SourceError(f"{path} holds no file that ends in {endings}; give another path or ending.")
            found.append((path, root, files))
        return found

    def state(self) -> Any:
        """Other names, sizes or times of change mean other content."""
        stats = [((root / name).stat(), path, name) for path, root, files in self._found() for name, _ in files]
        return [[path, name, stat.st_size, stat.st_mtime_ns] for stat, path, name in stats]

    def readers(self, cache: Path) -> "list[PipelineStep]":
        from data_pipeline.readers.reading import Origin, StrictJsonlReader, TextFileReader

        readers: list[PipelineStep] = []
        for path, root, files in self._found():
            origin = Origin(path, "", self.licence, "", str(root))
            if texts := [(name, kind) for name, kind in files if kind != "records"]:
                readers.append(TextFileReader(origin, texts))
            if records := [name for name, kind in files if kind == "records"]:
                readers.append(StrictJsonlReader(origin, records, self.text_key, self.kind))
        return readers
