"""Where text comes from. Each source knows what decides its content, how to get it, and under which licence it is.

A source is one file of this package: a frozen dataclass registered with `@register("corpus/source", name)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from conf.errors import LongrunError, Problem

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_pipeline.readers.reading import Found

PROSE = [".rst", ".md", ".txt"]
CODE = [".py"]


class SourceError(LongrunError):
    """A source of text cannot be had: no such file, a download failed, a licence is not accepted."""


class Source:
    """Subclasses are frozen dataclasses registered with `@register("corpus/source", name)`."""

    def problems(self, key: str) -> list[Problem]:
        """What is wrong with the settings; `key` is where they stand in the configuration."""
        return []

    def state(self) -> Any:
        """What decides the content beyond the settings: versions; names, sizes and times of files.

        Raises:
            SourceError: the source does not exist.
        """
        return None

    def readers(self, cache: Path) -> "list[PipelineStep]":
        """datatrove readers, after everything they read was fetched.

        Raises:
            SourceError: it cannot be fetched, or its licence is not accepted.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Fields:
    """Where a record has its text, and what is known of it. A name with dots leads into records within it.

    Args:
        text: field of the text.
        id: field of a name that no other record has; empty names records by file and line.
        date: field of a date; empty for none.
        licence: field of a licence; empty for none.
        url: field of an address; empty for none.
    """

    text: str = "text"
    id: str = ""
    date: str = ""
    licence: str = ""
    url: str = ""

    @property
    def columns(self) -> list[str]:
        """Names of the fields that hold them, outermost."""
        keys = (self.text, self.id, self.date, self.licence, self.url)
        return sorted({key.split(".")[0] for key in keys if key})

    def value(self, record: Any, key: str) -> Any:
        """What a record has there; None where it has nothing, or is no record."""
        for name in key.split("."):
            record = record.get(name) if isinstance(record, dict) else None
        return record


@dataclass(frozen=True)
class FileSource(Source):
    """Files of one sort, single ones or in directories. Links that lead out of a directory are not followed.

    Args:
        paths: directories, searched through, or single files.
        exclude: shell patterns of paths, beginning with "/" at the directory given, that are left out.
        licence: under which the text may be used, where it does not say so itself.
        date: when it was written or collected, as ISO 8601, where it does not say so itself; empty if unknown.
        kind: what the text is: "prose" or "code".
    """

    paths: list[str] = MISSING
    exclude: list[str] = field(default_factory=lambda: ["*/.*"])
    licence: str = "not stated"
    date: str = ""
    kind: str = "prose"

    def problems(self, key: str) -> list[Problem]:
        fix = "files or directories, such as corpus.paths=[notes/]"
        found = [] if self.paths else [Problem(f"{key}.paths", "[]", fix)]
        return found + kind_problems(key, self.kind)

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files that are read."""
        raise NotImplementedError

    def found(self) -> "Found":
        """Of each path the files in it.

        Raises:
            SourceError: there is no such path, or no file to read in it.
        """
        from data_pipeline.readers.reading import Origin

        found: list[tuple[Origin, list[str]]] = []
        for path in self.paths:
            root, names = listed(path)
            names = [n for n in names if n.lower().endswith(self.endings) and not excluded(n, self.exclude)]
            if not names:
                endings = ", ".join(self.endings)
                raise SourceError(f"{path} holds no file that ends in {endings}; give another path or ending.")
            found.append((Origin(path, "", self.licence, "", str(root), self.date), names))
        return found

    def state(self) -> Any:
        """Other names, sizes or times of change mean other content."""
        stats = [((Path(o.path) / name).stat(), o.name, name) for o, names in self.found() for name in names]
        return [[path, name, stat.st_size, stat.st_mtime_ns] for stat, path, name in stats]

    def readers(self, cache: Path) -> "list[PipelineStep]":
        return self.reading(self.found())

    def reading(self, found: "Found") -> "list[PipelineStep]":
        """datatrove readers of these files."""
        raise NotImplementedError


def kind_problems(key: str, kind: str) -> list[Problem]:
    return [] if kind in ("prose", "code") else [Problem(f"{key}.kind", kind, "one of prose, code")]


def excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch("/" + name, pattern) for pattern in patterns)


def listed(path: str) -> tuple[Path, list[str]]:
    """A directory and all files in it, relative and sorted; of a single file its directory and itself.

    Raises:
        SourceError: there is neither.
    """
    root = Path(path).absolute()
    if root.is_file():
        return root.parent, [root.name]
    if not root.is_dir():
        raise SourceError(f"{path} does not exist; give a file or a directory to read.")
    real = root.resolve()
    files = (f for f in root.rglob("*") if f.is_file() and (not f.is_symlink() or f.resolve().is_relative_to(real)))
    return root, sorted(str(file.relative_to(root)) for file in files)
