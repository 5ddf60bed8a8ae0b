"""Repositories of programs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from conf.errors import Problem
from conf.registry import register
from data_pipeline.sources.base import PROSE, Source, SourceError, excluded, listed

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_pipeline.readers.reading import Found

PERMISSIVE = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unlicense",
    "Zlib",
]


@register("corpus/source", "repositories")
@dataclass(frozen=True)
class Repositories(Source):
    """Checked-out repositories, each under the licence that its licence file is, or that its package metadata states.
    Languages are told by ending, file name or interpreter line; generated and vendored files by the step `authored`.

    Args:
        paths: directories, each a repository, or ending in "/*", each a directory of repositories.
        languages: those that are read, as python, c++, ts, shell; empty reads all programming languages.
        prose: endings of files read as natural language.
        exclude: shell patterns of paths, beginning with "/" at the repository, that are left out.
        licences: SPDX identifiers; a repository under another licence stops the build. Empty accepts all.
        date: when they were written or collected, as ISO 8601; empty if unknown.
    """

    paths: list[str] = MISSING
    languages: list[str] = field(default_factory=list)
    prose: list[str] = field(default_factory=lambda: list(PROSE))
    exclude: list[str] = field(default_factory=lambda: ["*/.*"])
    licences: list[str] = field(default_factory=lambda: list(PERMISSIVE))
    date: str = ""

    def problems(self, key: str) -> list[Problem]:
        from data_pipeline.readers.repositories import LANGUAGES

        fix = "directories of repositories, such as corpus.paths=[src/mine, checkouts/*]"
        found = [] if self.paths else [Problem(f"{key}.paths", "[]", fix)]
        if unknown := [language for language in self.languages if language not in LANGUAGES]:
            found.append(Problem(f"{key}.languages", ", ".join(unknown), f"made of {', '.join(sorted(LANGUAGES))}"))
        return found

    def roots(self) -> list[str]:
        """Every repository."""
        found = []
        for path in self.paths:
            if not path.endswith("/*"):
                found.append(path)
                continue
            inner = sorted(str(child) for child in Path(path[:-2]).glob("*") if child.is_dir())
            if not inner:
                raise SourceError(f"{path[:-2]} holds no directory; give one that holds repositories.")
            found += inner
        return found

    def files(self) -> list[tuple[str, Path, list[str]]]:
        """(repository, its directory, its files)"""
        found = [(root, *listed(root)) for root in self.roots()]
        return [
            (root, path, [name for name in names if not excluded(name, self.exclude)]) for root, path, names in found
        ]

    def state(self) -> Any:
        """Other names, sizes or times of change mean other content."""
        stats = [((path / name).stat(), root, name) for root, path, names in self.files() for name in names]
        return [[root, name, stat.st_size, stat.st_mtime_ns] for stat, root, name in stats]

    def readers(self, cache: Path) -> "list[PipelineStep]":
        from data_pipeline.readers.reading import Origin
        from data_pipeline.readers.repositories import RepositoryReader, commit_of, licence_of

        found: Found = []
        refused = []
        for root, path, names in self.files():
            licence = licence_of(path)
            if self.licences and not set(licence.split(" AND ")) <= set(self.licences):
                refused.append(f"{root}: {licence or 'no licence stated'}")
            found = [*found, (Origin(root, commit_of(path), licence or "not stated", "", str(path), self.date), names)]
        if refused:
            raise SourceError(
                "The licence of these repositories is not among those accepted:\n  "
                + "\n  ".join(refused)
                + f"\nLeave them out, or accept it in `licences` (now: {', '.join(self.licences)})."
            )
        return [RepositoryReader(found, tuple(self.prose), tuple(self.languages))]
