"""Bytes of files that nobody vouches for, plain, .gz or .zst: in bounded memory, and what is damaged is said to be."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from data_pipeline.sources.base import SourceError

BLOCK = 2**20
"""Bytes read at a time."""
SLICE = 2**10
"""Bytes of Zstandard given to the decompressor at a time: the least bytes that can stand for a block of 128 KiB are 4,
so this bounds what comes out at once to 32 MiB."""
LONGEST_LINE = 16 * 2**20
"""Bytes. A longer line is no document."""


class DamageError(Exception):
    """Bytes are not what their format asks for. Caught by the reader, which turns it into a document in quarantine.

    Args:
        message: what is wrong.
        rest: what was read of the record that is cut off.
    """

    def __init__(self, message: str, rest: bytes = b""):
        super().__init__(message)
        self.rest = rest


@dataclass(frozen=True)
class Line:
    """One line without its end.

    Args:
        content: at most `LONGEST_LINE` bytes of it.
        size: bytes that it has.
    """

    content: bytes
    size: int

    @property
    def whole(self) -> bool:
        return len(self.content) == self.size


def lines(file: Path) -> Iterator[Line]:
    """Lines of a file that is plain, .gz or .zst; memory is bounded by the longest line that is kept.

    Raises:
        DamageError: the compressed data are damaged or break off; comes after all lines before that.
        SourceError: the file is not there any more.
    """
    held: list[bytes] = []
    size = 0
    try:
        for block in blocks(file):
            *ends, rest = block.split(b"\n")
            for part in ends:
                held.append(part[: max(0, LONGEST_LINE - size)])
                yield Line(b"".join(held), size + len(part))
                held, size = [], 0
            held.append(rest[: max(0, LONGEST_LINE - size)])
            size += len(rest)
    except DamageError as error:
        raise DamageError(str(error), b"".join(held)) from error
    if size:
        yield Line(b"".join(held), size)


def blocks(file: Path) -> Iterator[bytes]:
    """The content of a file, decompressed by its ending.

    Raises:
        DamageError: the compressed data are damaged or break off; comes after all that can be read.
        SourceError: the file is not there any more.
    """
    try:
        yield from {".gz": _gzip_blocks, ".zst": _zstandard_blocks}.get(file.suffix.lower(), _plain_blocks)(file)
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DamageError(str(error)) from error
    except OSError as error:
        raise vanished(file, error) from error


def vanished(file: Path, error: OSError) -> SourceError:
    return SourceError(
        f"{file} was found, but cannot be read now ({error.strerror or error}); see to it that the source stays as it "
        "is, and run again: what was read is kept."
    )


def _plain_blocks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            yield block


def _gzip_blocks(file: Path) -> Iterator[bytes]:
    with gzip.open(file) as stream:
        while block := stream.read1(BLOCK):  # type: ignore[attr-defined]  # `read` would lose what comes before a fault
            yield block


def _zstandard_blocks(file: Path) -> Iterator[bytes]:
    held, size = [], 0
    try:
        for content in _zstandard_slices(file):
            held.append(content)
            size += len(content)
            if size >= BLOCK // 8:
                yield b"".join(held)
                held, size = [], 0
    except (EOFError, zstandard.ZstdError):
        yield b"".join(held)  # all that comes before the fault
        raise
    yield b"".join(held)


def _zstandard_slices(file: Path) -> Iterator[bytes]:
    # By hand: zstandard's own readers take a file that breaks off for one that ends.
    frame = None
    for block in _plain_blocks(file):
        for begin in range(0, len(block), SLICE):
            given = block[begin : begin + SLICE]
            while given:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(given)
                given, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("it ends within a frame")


class Stream:
    """`blocks` as something to `read` from, forward only.

    Args:
        file: plain, .gz or .zst.
    """

    def __init__(self, file: Path):
        self._blocks = blocks(file)
        self._unread = b""
        self.offset = 0
        """Bytes given out so far."""

    def read(self, size: int) -> bytes:
        """Exactly so many bytes; fewer only at the end.

        Raises:
            DamageError: as `blocks`; `rest` is what was read of them.
        """
        return self._taken(size, None)

    def line(self, longest: int) -> bytes:
        """Up to and with the next line feed; cut after so many bytes.

        Raises:
            DamageError: as `blocks`; `rest` is what was read of it.
        """
        return self._taken(longest, b"\n")

    def _taken(self, size: int, end: bytes | None) -> bytes:
        parts: list[bytes] = []
        lacking = size
        while lacking and (self._unread or self._refilled(parts)):
            found = self._unread.find(end, 0, lacking) if end else -1
            cut = lacking if found < 0 else found + 1
            part, self._unread = self._unread[:cut], self._unread[cut:]
            parts.append(part)
            lacking = 0 if found >= 0 else lacking - len(part)
        content = b"".join(parts)
        self.offset += len(content)
        return content

    def _refilled(self, parts: list[bytes]) -> bool:
        """Whether there was a next block."""
        try:
            self._unread = next((block for block in self._blocks if block), b"")
        except DamageError as error:
            raise DamageError(str(error), b"".join(parts)) from error
        return bool(self._unread)
