"""Documentation and code out of source distributions of Python packages."""

import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.parser import BytesHeaderParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from conf.errors import Problem
from conf.registry import register
from data_pipeline.sources.base import CODE, PROSE, Source, SourceError

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
DOWNLOAD_TIMEOUT_S = 300


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
        from data_pipeline.readers.archives import ArchiveReader
        from data_pipeline.readers.reading import Origin, Selection

        with ThreadPoolExecutor(max_workers=2) as threads:
            archives = list(threads.map(lambda package: downloaded(package, cache / "sdists"), self.packages))
        found, refused = [], []
        for package, archive in zip(self.packages, archives, strict=True):
            headers = package_headers(archive)
            licence = stated_licence(headers)
            if not any(word.lower() in licence.lower() for word in self.licences):
                refused.append(f"{package}: {licence or 'no licence stated'}")
            name, version = package.split("==")
            origin = Origin(name, version, licence, f"pkg:pypi/{name}@{version}", str(archive.parent))
            found.append((origin, [archive.name]))
        if refused:
            raise SourceError(
                "The licence of these packages is not among those accepted:\n  "
                + "\n  ".join(refused)
                + f"\nLeave them out, or accept it in `licences` (now: {', '.join(self.licences)})."
            )
        selection = Selection(tuple(self.prose), tuple(self.code), tuple(self.exclude))
        return [ArchiveReader(found, selection, below=1)]


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
    from data_pipeline.readers.archives import LARGEST_HEADER, BoundedInfo

    try:
        with tarfile.open(archive, tarinfo=BoundedInfo) as tar:
            for member in tar:
                if member.isfile() and re.fullmatch(r"[^/]+/PKG-INFO", member.name):
                    stream = tar.extractfile(member)
                    assert stream is not None  # a regular file has content
                    return BytesHeaderParser().parsebytes(stream.read(LARGEST_HEADER))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{archive} is damaged ({error}); delete it to fetch it again.") from error
    raise SourceError(f"{archive} has no PKG-INFO, so its licence is unknown; leave it out.")


def stated_licence(headers: Any) -> str:
    """One line: the licence expression, else classifiers, else the first line of the free text."""
    if expression := headers.get("License-Expression"):
        return expression
    classifiers = [c.split(" :: ")[-1] for c in headers.get_all("Classifier", []) if c.startswith("License ::")]
    return ", ".join(classifiers) or (headers.get("License") or "").strip().split("\n")[0]
