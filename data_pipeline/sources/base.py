"""Where text comes from. Each source knows what decides its content, how to get it, and under which licence it is.

A source is one file of this package: a frozen dataclass registered with `@register("corpus/source", name)`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import LongrunError, Problem

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

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


def kind_problems(key: str, kind: str) -> list[Problem]:
    return [] if kind in ("prose", "code") else [Problem(f"{key}.kind", kind, "one of prose, code")]


def listed(path: str) -> tuple[Path, list[str]]:
    """A directory and all files in it, relative and sorted; of a single file its directory and itself."""
    root = Path(path).absolute()
    if root.is_file():
        return root.parent, [root.name]
    if not root.is_dir():
        raise SourceError(f"{path} does not exist; give a file or a directory to read.")
    return root, sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
