"""Pages left out by their address: listed sites, and words in the address (Penedo et al. 2023, arXiv:2306.01116,
appendix G.1)."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.steps.base import DocumentStep

LISTS = ("domains", "urls", "words", "soft_words", "parts", "patterns")
SEPARATORS = re.compile(r"[^a-zA-Z0-9]+")


@register("corpus/step", "url")
@dataclass(frozen=True)
class Url(DocumentStep):
    """Drop documents whose metadata `url` is on a list. Documents without one pass, counted as `no_url`.

    Lists are given in the configuration, in files of one entry a line ("#" begins a comment), or both. With
    `packaged`, those of datatrove are added: 4.6 million domains of the adult, gambling, phishing and similar kinds
    (UT1 of the University of Toulouse) and words for adult content.

    Args:
        domains: sites; a site's subdomains are on the list too.
        urls: complete addresses.
        words: words of the address, between what is neither letter nor digit; one is enough.
        soft_words: words of which `most_soft_words` are too many.
        most_soft_words: a document is dropped for this many soft words.
        parts: what the address must not contain, taking letters and digits alone.
        patterns: regular expressions, searched for in the address as it is.
        files: list -> file with more of its entries.
        packaged: add datatrove's lists; 40 MB of memory and some seconds for each process.
    """

    domains: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    soft_words: list[str] = field(default_factory=list)
    most_soft_words: int = 2
    parts: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    packaged: bool = False

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        if self.most_soft_words < 1:
            found.append(Problem(f"{key}.most_soft_words", self.most_soft_words, "1 or more"))
        for name, file in self.files.items():
            if name not in LISTS:
                found.append(Problem(f"{key}.files", name, f"lists of {', '.join(LISTS)}"))
            elif not Path(file).is_file():
                found.append(Problem(f"{key}.files.{name}", file, "a file with one entry a line"))
            elif not is_utf8(Path(file)):
                found.append(Problem(f"{key}.files.{name}", file, "a file in UTF-8; convert it with iconv"))
        if not found:
            for pattern in self.entries("patterns"):
                try:
                    re.compile(pattern)
                except re.error as error:
                    found.append(Problem(f"{key}.patterns", pattern, f"a regular expression ({error})"))
            if not self.packaged and not any(any(self.entries(name)) for name in LISTS):
                found.append(Problem(key, "no list", f"some of {', '.join(LISTS)}, or {key}.packaged=true"))
        return found

    def state(self) -> Any:
        from importlib.metadata import version

        files = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in self.files.items()}
        return {"files": files, "packaged": version("datatrove") if self.packaged else None}

    def judge(self, page: Page) -> str | None:
        url = page.metadata.get("url")
        if not url:
            page.counts["no_url"] += 1
            return None
        if any(contains(self.hashed_domains, site) for site in sites(url)):
            return "domain"
        if contains(self.hashed_urls, url):
            return "url"
        words = set(SEPARATORS.split(url.lower()))
        if not words.isdisjoint(self.plain("words")):
            return "word"
        if len(words & self.plain("soft_words")) >= self.most_soft_words:
            return "soft_words"
        flat = SEPARATORS.sub("", url).lower()
        if any(part in flat for part in self.plain("parts")):
            return "part"
        return "pattern" if any(pattern.search(url) for pattern in self.compiled) else None

    def entries(self, name: str) -> Iterator[str]:
        """All entries of a list, wherever they come from."""
        yield from getattr(self, name)
        if name in self.files:
            with open(self.files[name], encoding="utf-8") as file:
                yield from lines(file)
        if self.packaged:
            yield from packaged(name)

    def plain(self, name: str) -> frozenset[str]:
        return self.word_lists[name]

    @cached_property
    def word_lists(self) -> dict[str, frozenset[str]]:
        return {
            name: frozenset(SEPARATORS.sub("", entry).lower() for entry in self.entries(name)) - {""}
            for name in ("words", "soft_words", "parts")
        }

    @cached_property
    def compiled(self) -> list[re.Pattern[str]]:
        return [re.compile(pattern) for pattern in self.entries("patterns")]

    @cached_property
    def hashed_domains(self) -> np.ndarray:
        return hashed(entry.lower() for entry in self.entries("domains"))

    @cached_property
    def hashed_urls(self) -> np.ndarray:
        return hashed(self.entries("urls"))


def sites(url: str) -> list[str]:
    """The host of an address and all that it is a part of: a.b.org, b.org, org."""
    try:
        host = urlsplit(url if "://" in url else "//" + url).hostname or ""
    except ValueError:  # square brackets around what is no address
        return []
    labels = host.strip(".").split(".")
    return [".".join(labels[at:]) for at in range(len(labels))]


def lines(file: Iterable[str]) -> Iterator[str]:
    """Entries of a list: lines that are neither empty nor comments."""
    stripped = (line.strip() for line in file)
    return (line for line in stripped if line and not line.startswith("#"))


def packaged(name: str) -> Iterator[str]:
    """A list of datatrove's, read inside its archive."""
    import io
    import tarfile

    from datatrove.utils._import_utils import ASSETS_PATH

    texts = {"words": "banned_words.txt", "soft_words": "soft_banned_words.txt", "parts": "banned_subwords.txt"}
    if name in texts:
        with open(Path(ASSETS_PATH) / texts[name], encoding="utf-8") as file:
            yield from lines(file)
    elif name in ("domains", "urls"):
        with tarfile.open(Path(ASSETS_PATH) / "url_filterblacklistsv0_3_0.tar.gz") as archive:
            member = archive.extractfile(name)
            assert member is not None  # both are regular files
            yield from lines(io.TextIOWrapper(member, encoding="utf-8"))


def hashed(entries: Iterable[str]) -> np.ndarray:
    """Sorted 64-bit hashes: a set of millions of addresses in 8 bytes each."""
    return np.unique(np.fromiter(map(hash_of, entries), dtype=np.uint64))


def hash_of(entry: str) -> int:
    import xxhash

    return xxhash.xxh64_intdigest(entry.encode("utf-8", errors="surrogatepass"))


def contains(hashes: np.ndarray, entry: str) -> bool:
    if not len(hashes):
        return False
    value = np.uint64(hash_of(entry))
    place = int(hashes.searchsorted(value))
    return place < len(hashes) and hashes[place] == value


def is_utf8(file: Path) -> bool:
    try:
        with open(file, encoding="utf-8") as stream:
            return all(True for _ in stream)
    except UnicodeDecodeError:
        return False
