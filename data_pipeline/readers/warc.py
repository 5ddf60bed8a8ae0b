"""WARC files (ISO 28500): web pages as a crawler stored them, and the text that others took out of them (WET).

Records are cut out here, within bounds, and read by warcio: alone, it ends without a word where a file breaks off, and
loses its way after a wrong length. After what is no record this goes on at the next line that begins one.
"""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from datatrove.data import Document
from warcio.bufferedreaders import ChunkedDataException, ChunkedDataReader
from warcio.exceptions import ArchiveLoadFailed
from warcio.recordloader import ArcWarcRecord, ArcWarcRecordLoader
from warcio.statusandheaders import StatusAndHeadersParserException

from data_pipeline.readers.extraction import LARGEST_PAGE, PageReader, codec
from data_pipeline.readers.reading import PASSED_OVER, encodable, iso, named
from data_pipeline.readers.streams import BLOCK, DamageError, Stream

VERSION = re.compile(rb"WARC/1\.\d\r?\n")
LENGTH = re.compile(rb"^Content-Length:[ \t]*(\d{1,15})[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)
NAME = re.compile(rb"^(?:([A-Za-z0-9-]+):|[ \t])[^\0\r\n]*\r?$", re.MULTILINE)
ONCE = (b"warc-type", b"warc-record-id", b"warc-target-uri", b"content-length")
"""Headers that a record has once; where there are two of one, two records have run together."""
LARGEST_HEAD = 2**17
"""Bytes of the headers of a record."""
TYPES = ("warcinfo", "response", "resource", "request", "metadata", "revisit", "conversion", "continuation")
HTML = ("text/html", "application/xhtml+xml")
GZIP = ("gzip", "x-gzip")
"""Content encodings."""
CHARSET = re.compile(r"charset\s*=\s*[\"']?([A-Za-z0-9_:.-]{2,40})", re.IGNORECASE)


MALFORMED = (
    ArchiveLoadFailed,
    ChunkedDataException,
    StatusAndHeadersParserException,
    DamageError,
    AttributeError,
    EOFError,
    ValueError,
)
"""What warcio raises for records that are damaged; AttributeError, where a header is missing that it counts on."""


@dataclass(frozen=True)
class Piece:
    """Part of a WARC file.

    Args:
        offset: where it begins, in bytes of the unpacked file.
        content: its bytes; of one that is too large, the headers only.
        fault: why it is no record; empty for one.
    """

    offset: int
    content: bytes
    fault: str = ""


class WarcReader(PageReader):
    """WARC files, plain or .gz: a document for each page that was had (status 200) and for each text (WET). Of other
    records (requests, pictures, pages that were not found) the number is kept.

    Args:
        found: the files.
        kind: "prose" or "code".
    """

    name = "🕸️ WARC"

    def documents(self, file: Path, name: str) -> Iterator[Document]:
        found = False
        for piece in pieces(Stream(file)):
            found = True
            path = f"{name}:{piece.offset}"
            if piece.fault:
                yield self.origin.fault(path, self.kind, piece.fault, f"at byte {piece.offset:,}", piece.content)
            elif document := self.record(piece.content, path):
                yield document
        if not found:
            yield self.origin.fault(name, self.kind, "empty")

    def record(self, content: bytes, path: str) -> Document | None:
        """The document of one record; None for one that is of another sort."""
        try:
            record = ArcWarcRecordLoader().parse_record_stream(io.BytesIO(content), known_format="warc")
            if record.rec_type not in TYPES:
                return self.origin.fault(path, self.kind, "unknown_record", str(record.rec_type), content)
            media, charset = media_type(record)
            if sort := other_sort(record, media):
                self.stat_update(f"{PASSED_OVER}{encodable(self.origin.name)}\t{sort}")
                return None
            body = unpacked(record)
        except MALFORMED as error:
            return self.origin.fault(path, self.kind, "damaged", f"{type(error).__name__}: {error}", content)
        url = named(record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>")
        date = iso(record.rec_headers.get_header("WARC-Date") or "")
        own = named(record.rec_headers.get_header("WARC-Record-ID") or "").strip("<>")
        if media in HTML:
            document = self.page(self.origin, path, body, charset, url, date)
        else:
            document = self.text(path, body, charset, url, date)
        if own:
            document.id = f"{encodable(self.origin.name)}#{own}"
        return document

    def text(self, path: str, body: bytes, charset: str, url: str, date: str) -> Document:
        if len(body) > LARGEST_PAGE:
            return self.origin.fault(path, self.kind, "too_large", f"more than {LARGEST_PAGE:,} bytes", body)
        try:
            text = body.decode(codec(charset) or "utf-8")
        except UnicodeDecodeError as error:
            return self.origin.fault(path, self.kind, "not_decodable", str(error), body)
        return self.origin.document(path, self.kind, text, url=url, date=date)


def unpacked(record: ArcWarcRecord) -> bytes:
    """What a record holds, at most one byte more than a page may have.

    Raises:
        ChunkedDataException: it says that it comes in chunks, and one is none or breaks off, or the last is lacking.
        DamageError: it cannot be unpacked.
    """
    headers = record.http_headers
    chunked = headers is not None and str(headers.get_header("Transfer-Encoding")).strip().lower() == "chunked"
    if chunked:
        body = ChunkedDataReader(record.raw_stream, raise_exceptions=True).read()
        if record.raw_stream.read(1):
            raise DamageError("something follows its last chunk")
    else:
        body = record.raw_stream.read()
    return unpacked_body(body, str((headers and headers.get_header("Content-Encoding")) or ""))


def unpacked_body(body: bytes, encoding: str) -> bytes:
    """What a server sent, at most one byte more than a page may have.

    Args:
        body: as it was sent.
        encoding: value of Content-Encoding; empty if there was none.

    Raises:
        DamageError: it is packed in a way that is not known, is damaged, breaks off, or something follows it.
    """
    encoding = encoding.strip().lower() or "identity"
    if encoding == "identity":
        return body
    if encoding not in (*GZIP, "deflate"):
        raise DamageError(f"packed as {encoding[:50]}, which is not known here")
    if not body:
        raise DamageError("its body breaks off")
    try:
        if encoding in GZIP:  # of one member or several
            return gzip.GzipFile(fileobj=io.BytesIO(body)).read(LARGEST_PAGE + 1)
        raw = body[:1] != b"\x78"  # some servers leave out zlib's own frame
        packed = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS)
        content = packed.decompress(body, LARGEST_PAGE + 1)
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DamageError(str(error)) from error
    if not packed.eof and len(content) <= LARGEST_PAGE:
        raise DamageError("its body breaks off")
    if packed.unused_data:
        raise DamageError("something follows its body")
    return content


def media_type(record: ArcWarcRecord) -> tuple[str, str]:
    """Media type of what was stored, in lower case, and its charset; each empty if not stated."""
    headers = record.http_headers or record.rec_headers
    stated = str(headers.get_header("Content-Type") or "")
    charset = CHARSET.search(stated)
    return stated.split(";")[0].strip().lower(), charset[1] if charset else ""


def other_sort(record: ArcWarcRecord, media: str) -> str:
    """What a record is, if no text is expected of it; empty for one that is read."""
    if record.rec_type not in ("response", "resource", "conversion"):
        return record.rec_type
    uri = str(record.rec_headers.get_header("WARC-Target-URI") or "")
    if record.rec_type == "response":
        if uri.split(":")[0] not in ("http", "https"):
            return "other protocols"
        status = record.http_headers.get_statuscode() if record.http_headers else ""
        if status != "200":
            return f"status {status[:3]}"
    if urlsplit(uri).path == "/robots.txt":
        return "robots.txt"
    return "" if not media or media in HTML or media == "text/plain" else media[:50]


def pieces(stream: Stream) -> Iterator[Piece]:
    """Records, and what lies between them that is none.

    Raises:
        DamageError: the file breaks off, or its compressed data are damaged.
    """
    astray = b""
    begin = blank = 0
    while line := stream.line(LARGEST_HEAD):
        offset = stream.offset - len(line)
        if not VERSION.fullmatch(line):
            blank += line in (b"\r\n", b"\n")
            if line.strip() or astray:
                begin, astray = (begin, astray[:LARGEST_HEAD] + line) if astray else (offset, line)
            continue
        if astray:
            yield Piece(begin, astray, "damaged")
            astray = b""
        blank = 0
        yield record(stream, line, offset)
    if astray:
        yield Piece(begin, astray, "damaged")
    elif stream.offset and blank < 2:
        raise DamageError("it breaks off after its last record")


def record(stream: Stream, version: bytes, offset: int) -> Piece:
    head = version
    while (line := stream.line(LARGEST_HEAD)).strip():
        head += line
        if len(head) > LARGEST_HEAD:
            return Piece(offset, head, "damaged")
    if not line:
        raise DamageError(f"it breaks off within the headers at byte {offset:,}", head)
    stated = LENGTH.search(head)
    names = [name.lower() for name in NAME.findall(head)]
    if stated is None or len(names) != head.count(b"\n") - 1 or any(names.count(name) > 1 for name in ONCE):
        return Piece(offset, head, "damaged")
    length = int(stated[1])
    if length > LARGEST_PAGE + LARGEST_HEAD:
        left = length
        while left and (part := stream.read(min(left, BLOCK))):
            left -= len(part)
        if left:
            raise DamageError(f"it breaks off within the record at byte {offset:,}", head)
        return Piece(offset, head, "too_large")
    body = stream.read(length)
    if len(body) < length:
        raise DamageError(f"it breaks off within the record at byte {offset:,}", head + line + body)
    return Piece(offset, head + line + body)
