"""Repositories of programs: each file with its language, under the licence that its repository states."""

import io
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import orjson
from datatrove.data import Document
from identify import identify

from data_pipeline.readers.reading import PASSED_OVER, FileReader, Found, encodable
from data_pipeline.readers.text import text_document

LARGEST_SOURCE = 4 * 2**20
"""Bytes. A larger file is data, not a program."""
LONGEST_SHEBANG = 200
"""Bytes."""
LARGEST_LICENCE = 2**17
"""Bytes."""
LICENCE_FILES = ("licen[cs]e*", "LICEN[CS]E*", "Licen[cs]e*", "COPYING*", "UNLICEN[CS]E*")
LANGUAGES = (
    *(
        "python",
        "cython",
        "c++",
        "cuda",
        "objective-c++",
        "objective-c",
        "c",
        "c#",
        "java",
        "kotlin",
        "scala",
        "groovy",
    ),
    *("javascript", "jsx", "tsx", "ts", "vue", "svelte", "go", "rust", "zig", "swift", "dart", "nim", "crystal"),
    *("ruby", "perl", "php", "lua", "luau", "r", "julia", "haskell", "ocaml", "f#", "elm", "purescript", "erlang"),
    *("elixir", "gleam", "clojure", "clojurescript", "scheme", "lean", "idris", "fortran", "pascal", "vb", "asm"),
    *("verilog", "system-verilog", "vhdl", "solidity", "sql", "shell", "fish", "powershell", "batch", "awk"),
    *("cmake", "makefile", "dockerfile", "nix", "terraform", "proto", "thrift", "graphql", "css", "scss", "vim"),
)
"""What is a programming language among the tags of `identify`; of several that fit, the first."""


class RepositoryReader(FileReader):
    """Files of repositories.

    Args:
        found: of each repository its files.
        prose: endings of files that are natural language.
        languages: those that are read; empty reads all.
    """

    name = "🗂️ Repositories"

    def __init__(self, found: Found, prose: tuple[str, ...], languages: tuple[str, ...]):
        super().__init__(found, "code")
        self.prose = prose
        self.languages = languages

    def documents(self, file: Path, name: str) -> Iterator[Document]:
        repository = encodable(self.origin.name)
        named = {"repository": repository}
        if PurePosixPath(name).suffix.lower() in self.prose:
            yield text_document(self.origin, name, "prose", content_of(file), **named)
            return
        language = language_of(file)
        if language is None or (self.languages and language not in self.languages):
            self.stat_update(f"{PASSED_OVER}{repository}\t{language or 'no program'}")
            return
        yield text_document(self.origin, name, "code", content_of(file), programming_language=language, **named)


def content_of(file: Path) -> bytes | None:
    return None if file.stat().st_size > LARGEST_SOURCE else file.read_bytes()


def language_of(file: Path) -> str | None:
    """By its name, or else by the interpreter that its first line names; None for what is no program."""
    tags = identify.tags_from_filename(file.name)
    if not tags:
        with open(file, "rb") as stream:
            shebang = identify.parse_shebang(io.BytesIO(stream.read(LONGEST_SHEBANG)))
        tags = identify.tags_from_interpreter(shebang[0]) if shebang else set()
    return next((language for language in LANGUAGES if language in tags), None)


def licence_of(repository: Path) -> str:
    """SPDX identifier of the licence of a repository: what its licence file is within 5% of, or else what its package
    metadata states; empty where neither says anything.

    Of several licence files all are named: a program under either is under each of them, as far as this can tell.
    """
    files = sorted({file for pattern in LICENCE_FILES for file in repository.glob(pattern) if file.is_file()})
    read = [file for file in files if not file.is_symlink() and file.stat().st_size <= LARGEST_LICENCE]
    found = {spdx_of(file) or f"unknown ({file.name})" for file in read}
    return " AND ".join(sorted(found)) or stated_licence(repository)


def spdx_of(file: Path) -> str | None:
    try:
        return identify.license_id(str(file))
    except UnicodeDecodeError:
        return None


def stated_licence(repository: Path) -> str:
    """What package.json, pyproject.toml or Cargo.toml says."""
    for name, table in {"package.json": "", "pyproject.toml": "project", "Cargo.toml": "package"}.items():
        try:
            content = (repository / name).read_bytes()
            metadata = tomllib.loads(content.decode())[table] if table else orjson.loads(content)
            licence = metadata.get("license")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if isinstance(licence, dict):
            licence = licence.get("text") or licence.get("type")
        if isinstance(licence, str) and len(licence) < 100:
            return licence.strip()
    return ""


def commit_of(repository: Path) -> str:
    """The commit that is checked out, read without running git in a directory that nobody vouches for; else empty."""
    try:
        head = (repository / ".git/HEAD").read_text()
        reference = head.removeprefix("ref: ").strip()
        if head.startswith("ref: ") and ".." not in reference:
            loose = repository / ".git" / reference
            packed = repository / ".git/packed-refs"
            lines = packed.read_text().splitlines() if packed.exists() and not loose.exists() else []
            found = [line.split()[0] for line in lines if line.endswith(f" {reference}")]
            return found[0] if found else loose.read_text().strip()[:64]
        return reference[:64]
    except (OSError, UnicodeDecodeError, IndexError):
        return ""
