"""Where text comes from. Each source knows what decides its content, how to get it, and under which licence it is."""

import re
import subprocess
import sys
import sysconfig
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.parser import BytesHeaderParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from conf.errors import LongrunError, Problem
from conf.registry import register

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

PROSE = [".rst", ".md", ".txt"]
CODE = [".py"]
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
DOWNLOAD_TIMEOUT_S = 300


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


@register("corpus/source", "sdists")
@dataclass(frozen=True)
class Sdists(Source):
    """Documentation and code in source distributions of Python packages, fetched by pip.

    Args:
        packages: pinned, `name==version`.
        prose: endings of files read as natural language.
        code: endings of files read as code.
        exclude: shell patterns of paths, beginning with "/" at the distribution's root, that are left out.
        licences: a package is read only if what its metadata says of its licence contains one of these words.
    """

    packages: list[str] = MISSING
    prose: list[str] = field(default_factory=lambda: list(PROSE))
    code: list[str] = field(default_factory=lambda: list(CODE))
    exclude: list[str] = field(default_factory=lambda: ["*/locale/*", "*/test/*", "*/tests/*", "*/testing/*"])
    licences: list[str] = field(default_factory=lambda: ["BSD", "MIT", "PSF", "Python Software Foundation", "Apache"])

    def problems(self, key: str) -> list[Problem]:
        unpinned = [package for package in self.packages if not PINNED.fullmatch(package)]
        return [Problem(f"{key}.packages", package, "a pinned version, such as Flask==3.1.3") for package in unpinned]

    def readers(self, cache: Path) -> "list[PipelineStep]":
        from data_pipeline.corpus.steps.reading import Origin, SdistReader, Selection

        with ThreadPoolExecutor(max_workers=2) as threads:
            archives = list(threads.map(lambda package: downloaded(package, cache / "sdists"), self.packages))
        origins, refused = [], []
        for package, archive in zip(self.packages, archives, strict=True):
            headers = package_headers(archive)
            licence = stated_licence(headers)
            if not any(word.lower() in licence.lower() for word in self.licences):
                refused.append(f"{package}: {licence or 'no licence stated'}")
            name, version = package.split("==")
            origins.append(Origin(name, version, licence, f"pkg:pypi/{name}@{version}", str(archive)))
        if refused:
            raise SourceError(
                "The licence of these packages is not among those accepted:\n  "
                + "\n  ".join(refused)
                + f"\nLeave them out, or accept it in `licences` (now: {', '.join(self.licences)})."
            )
        return [SdistReader(origins, Selection(tuple(self.prose), tuple(self.code), tuple(self.exclude)))]


def downloaded(package: str, cache: Path) -> Path:
    """The archive of a pinned source distribution, from the cache or by pip.

    Raises:
        SourceError: pip failed; says what it wrote.
    """
    directory = cache / package
    if not directory.exists():
        cache.mkdir(parents=True, exist_ok=True)
        name = package.split("==")[0]
        with TemporaryDirectory(dir=cache) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-binary", name, "--dest", temporary, package]
            try:
                result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise SourceError(
                    f"pip did not fetch {package} within {DOWNLOAD_TIMEOUT_S} s; try again, or leave it out."
                ) from error
            if result.returncode:
                raise SourceError(f"pip cannot fetch {package}:\n{result.stderr.strip()}\nMend that, or leave it out.")
            Path(temporary).chmod(0o755)
            Path(temporary).rename(directory)
            Path(temporary).mkdir()  # for the context manager to remove
    archives = list(directory.glob("*.tar.gz"))
    if len(archives) != 1:
        raise SourceError(f"{directory} should hold one .tar.gz, not {len(archives)}; delete it to fetch it again.")
    return archives[0]


def package_headers(archive: Path) -> Any:
    """The metadata headers of a source distribution (PKG-INFO).

    Raises:
        SourceError: the file is no such archive.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and re.fullmatch(r"[^/]+/PKG-INFO", member.name):
                    stream = tar.extractfile(member)
                    assert stream is not None  # a regular file has content
                    return BytesHeaderParser().parse(stream)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{archive} is damaged ({error}); delete it to fetch it again.") from error
    raise SourceError(f"{archive} has no PKG-INFO, so its licence is unknown; leave it out.")


def stated_licence(headers: Any) -> str:
    """One line: the licence expression, else classifiers, else the first line of the free text."""
    if expression := headers.get("License-Expression"):
        return expression
    classifiers = [c.split(" :: ")[-1] for c in headers.get_all("Classifier", []) if c.startswith("License ::")]
    return ", ".join(classifiers) or (headers.get("License") or "").strip().split("\n")[0]


@register("corpus/source", "standard_library")
@dataclass(frozen=True)
class StandardLibrary(Source):
    """Source files of the Python that runs this.

    Args:
        exclude: shell patterns of paths, beginning with "/" at the library's root, that are left out.
    """

    exclude: list[str] = field(
        default_factory=lambda: ["*/site-packages/*", "*/test/*", "*/tests/*", "*/idle_test/*", "/encodings/*"]
    )

    def state(self) -> Any:
        return sys.version.split()[0]

    def readers(self, cache: Path) -> "list[PipelineStep]":
        from data_pipeline.corpus.steps.reading import Origin, Selection, TextFileReader

        root = Path(sysconfig.get_path("stdlib"))
        selection = Selection((), tuple(CODE), tuple(self.exclude))
        names = (str(file.relative_to(root)) for file in sorted(root.rglob("*.py")))
        files = [(name, kind) for name in names if (kind := selection.kind(name))]
        version = sys.version.split()[0]
        origin = Origin("Python standard library", version, "PSF-2.0", "https://docs.python.org/3/library/", str(root))
        return [TextFileReader(origin, files)]


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
        from data_pipeline.corpus.steps.reading import Selection

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
        from data_pipeline.corpus.steps.reading import Origin, StrictJsonlReader, TextFileReader

        readers: list[PipelineStep] = []
        for path, root, files in self._found():
            origin = Origin(path, "", self.licence, "", str(root))
            if texts := [(name, kind) for name, kind in files if kind != "records"]:
                readers.append(TextFileReader(origin, texts))
            if records := [name for name, kind in files if kind == "records"]:
                readers.append(StrictJsonlReader(origin, records, self.text_key, self.kind))
        return readers


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
        from data_pipeline.corpus.steps.reading import HubReader, Origin

        options = {"split": self.split, "name": self.subset or None, "revision": self.revision or None}
        given = {name: value for name, value in options.items() if value}
        origin = Origin(
            self.dataset, self.revision, self.licence, f"pkg:huggingface/{self.dataset}@{self.revision}", ""
        )
        return [HubReader(origin, given, self.streaming, self.limit, self.text_key, self.kind)]


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
