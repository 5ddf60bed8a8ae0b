"""The main text of web pages, by trafilatura (Barbaresi 2021), in a process of its own.

A page can nest a million elements deep or make an expression run for hours, and what it breaks must not be the build.
In datatrove's extractor a process that cannot even start counts as a page that took too long, so that a missing package
drops every page and the run reports success; here it has to show that it works before it is given one.
"""

import codecs
import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from tempfile import TemporaryFile

from datatrove.data import Document, DocumentsPipeline

from data_pipeline.readers import extraction_worker
from data_pipeline.readers.extraction_worker import receive, send
from data_pipeline.readers.reading import FileReader, Origin, iso
from data_pipeline.sources.base import SourceError

LARGEST_PAGE = 16 * 2**20
"""Bytes. A larger page is a dump, or a bomb."""
MEMORY = 4 * 2**30
"""Bytes of address space of the process."""
SECONDS = 20
"""CPU time for a page."""
DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{2,40})", re.IGNORECASE)
SCANNED = 4096
"""Bytes at the beginning of a page in which it may say how it is encoded."""
ENCODINGS = re.compile(r"utf-8|utf-16(-[bl]e)?|iso8859-\d+|cp\d+|koi8-[rtu]|gb\w+|big5\w*|shift_jis\w*|euc_\w+")
"""Python's names of those that pages are written in. Other codecs may unpack, or take quadratic time."""


class Extractor:
    """Starts the process when it is first asked, and again after a page that broke it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Extractor":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process:
            assert self._process.stdin and self._process.stdout
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def __call__(self, page: str, url: str) -> dict[str, str]:
        """{"text", "date", "licence"} or {"fault", "detail"}.

        Raises:
            SourceError: trafilatura does not work here.
        """
        process = self._process or self._started()
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            send(process.stdin, {"page": page, "url": url})
        answer = receive(process.stdout)
        if answer is not None:
            return answer
        code = process.wait()
        self.__exit__()
        if code == -signal.SIGXCPU:
            return {"fault": "extraction_time", "detail": f"more than {SECONDS} s of CPU time"}
        return {"fault": "extraction_crash", "detail": f"the process ended with {code}"}

    def _started(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", extraction_worker.__file__, str(MEMORY), str(SECONDS)]
        with TemporaryFile() as errors:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            assert process.stdout
            answer = receive(process.stdout)
            if answer is None or not answer["works"]:
                process.kill()
                process.communicate()
                errors.seek(0)
                why = answer["detail"] if answer else errors.read().decode(errors="replace").strip()
                raise SourceError(
                    f"The main text of pages cannot be extracted: {why}\nInstall trafilatura and lxml_html_clean."
                )
        self._process = process
        return process


class PageReader(FileReader):
    """Reads web pages."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with Extractor() as self.extract:
            yield from super().run(data, rank, world_size)
        del self.extract

    def page(
        self, origin: Origin, path: str, content: bytes, charset: str = "", url: str = "", date: str = ""
    ) -> Document:
        """A document of a page.

        Args:
            origin: what it is part of.
            path: names it within the origin.
            content: as the server sent it.
            charset: as the server named it; empty if it did not.
            url: its address; empty if not known.
            date: for a page that says none itself, as ISO 8601.
        """
        if len(content) > LARGEST_PAGE:
            detail = f"{len(content):,} bytes; at most {LARGEST_PAGE:,}"
            return origin.fault(path, self.kind, "too_large", detail, content)
        html = decoded_page(content, charset)
        fault = "not_decodable" if html is None else "nul_bytes" if "\0" in html else "" if html.strip() else "empty"
        if fault:
            return origin.fault(path, self.kind, fault, f"charset {charset or 'not stated'}", content)
        assert html is not None
        found = self.extract(html, url)
        if "fault" in found:
            document = origin.fault(path, self.kind, found["fault"], found["detail"], html)
            document.metadata |= {"url": url} if url else {}
            return document
        when = iso(found["date"]) or date
        return origin.document(path, self.kind, found["text"], url=url, date=when, licence=found["licence"])


def decoded_page(content: bytes, charset: str) -> str | None:
    """A page as text; None where it is not what it says.

    What counts is, in this order: a byte order mark, the server's word, the page's own, UTF-8; a page that says nothing
    and is not UTF-8 is taken for windows-1252, as browsers do.
    """
    for encoding in encodings(content, charset):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def encodings(content: bytes, charset: str) -> Iterator[str]:
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    marked = [encoding for mark, encoding in marks.items() if content.startswith(mark)]
    declared = DECLARED.search(content[:SCANNED])
    stated = [charset] if charset else [declared[1].decode()] if declared else []
    known = [name for label in stated if (name := codec(label))]
    yield from marked or known or ["utf-8", "cp1252"]


def codec(label: str) -> str | None:
    """Python's name of an encoding of pages; None for what is none."""
    try:
        name = codecs.lookup(label).name
    except (LookupError, ValueError):
        return None
    latin = name in ("ascii", "iso8859-1")  # browsers take both for windows-1252
    return "cp1252" if latin else name if ENCODINGS.fullmatch(name) else None
