"""Archives, read without unpacking: members are untrusted, and nothing of them touches the disk.

Links and special files are not followed, and a path that leads out of the archive is a fault.
"""

import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Self

from datatrove.data import Document

from data_pipeline.readers.reading import PASSED_OVER, UNTRUE, FileReader, Found, Selection, encodable
from data_pipeline.readers.streams import BLOCK, DamageError
from data_pipeline.readers.text import text_document

LARGEST_FILE = 4 * 2**20
"""Bytes. A larger file in an archive is data, not text."""
LARGEST_RATIO = 200
"""What an archive may unpack to, as a multiple of its size; text packs to a tenth."""
LEAST_ALLOWED = 2**30
"""Bytes that any archive may unpack to."""
LARGEST_HEADER = 2**20
"""Bytes of a name, or of what else is told of a tar member before it; the library reads them at once."""
HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
LONGEST_END = 2**16 + 22
"""Bytes of the record, with its comment, that ends a zip archive."""
MANY = 2**16 - 1
"""Files, as that record says it of more than it can count."""
MALFORMED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    OverflowError,
    struct.error,
    NotImplementedError,
    RuntimeError,
)
"""What the standard library raises for archives that are damaged, or packed in a way that it does not know."""


@dataclass(frozen=True)
class Member:
    """A regular file in an archive.

    Args:
        path: its name in the archive.
        size: in bytes, as the archive says.
        read: gives its content.
    """

    path: str
    size: int
    read: Callable[[], bytes]

    @property
    def climbs(self) -> bool:
        """Whether the path leads out of the archive."""
        parts = (*PurePosixPath(self.path).parts, *PureWindowsPath(self.path).parts)
        return ".." in parts or PurePosixPath(self.path).is_absolute() or bool(PureWindowsPath(self.path).anchor)


def allowance(archive: Path) -> int:
    """Bytes that an archive may unpack to."""
    return max(LEAST_ALLOWED, LARGEST_RATIO * archive.stat().st_size)


def members(archive: Path) -> Iterator[Member]:
    """The regular files in a zip or tar archive.

    Raises:
        DamageError: no more can be read of it; comes after all members before that.
    """
    try:
        yield from zip_members(archive) if archive.suffix.lower() == ".zip" else tar_members(archive)
    except MALFORMED as error:
        raise DamageError(str(error)) from error


def zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as opened:
        found = opened.infolist()
        for info in found:
            if info.file_size or not info.is_dir():
                yield Member(info.filename, info.file_size, lambda info=info: opened.read(info))  # type: ignore[misc]
        # zipfile goes by the length of the directory; one entry that seems longer swallows those after it.
        assert opened.fp is not None
        opened.fp.seek(-min(LONGEST_END, archive.stat().st_size), os.SEEK_END)
        tail = opened.fp.read()
        (stated,) = struct.unpack_from("<H", tail, tail.rindex(b"PK\5\6") + 10)
        if stated not in (len(found), MANY):
            raise zipfile.BadZipFile(f"it should hold {stated} files, and {len(found)} can be found")


class BoundedInfo(tarfile.TarInfo):
    """A header of a tar archive; names and attributes that would fill the memory are damage."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type in HEADERS and info.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes; at most {LARGEST_HEADER:,}")
        return info


def tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive, tarinfo=BoundedInfo) as opened:
        for info in opened:
            if info.isfile():
                stream = opened.extractfile(info)
                assert stream is not None  # a regular file has content
                yield Member(info.name, info.size, stream.read)
        # tarfile takes a header that it cannot read for the end; the real one is two blocks of zeros or more.
        assert opened.fileobj is not None
        opened.fileobj.seek(opened.offset)
        length, zeros = 0, True
        while block := opened.fileobj.read(BLOCK):
            length, zeros = length + len(block), zeros and not any(block)
        if length < 2 * tarfile.BLOCKSIZE or not zeros:
            raise tarfile.ReadError(f"it breaks off at byte {opened.offset:,}")


class ArchiveReader(FileReader):
    """Text files in zip and tar archives.

    Args:
        found: the archives.
        selection: which members.
        below: levels of directories that a member's name goes without.
    """

    name = "📦 Archives"

    def __init__(self, found: Found, selection: Selection, below: int = 0):
        super().__init__(found)
        self.selection = selection
        self.below = below

    def documents(self, file: Path, name: str) -> Iterator[Document]:
        allowed = allowance(file)
        found = 0
        for member in members(file):
            if member.climbs:
                found += 1
                yield self.origin.fault(
                    f"{name}/{member.path}", self.kind, "unsafe_path", "it leads out of the archive"
                )
                continue
            inner = "/".join(PurePosixPath(member.path).parts[self.below :])
            kind = self.selection.kind(inner)
            if kind is None:
                self.stat_update(f"{PASSED_OVER}{encodable(self.origin.name)}\tother files")
                continue
            found += 1
            path = inner if self.below else f"{name}/{inner}"
            if member.size > LARGEST_FILE:
                yield self.origin.fault(path, kind, "too_large", f"{member.size:,} bytes; at most {LARGEST_FILE:,}")
                continue
            allowed -= member.size
            if allowed < 0:
                raise DamageError("it unpacks to more than an archive of its size may")
            yield self.content(member, path, kind)
        if not found:
            yield self.origin.fault(name, self.kind, "empty", "no file of text in it")

    def content(self, member: Member, path: str, kind: str) -> Document:
        try:
            return text_document(self.origin, path, kind, member.read())
        except (*MALFORMED, OSError) as error:
            if isinstance(error, OSError) and error.errno not in UNTRUE:
                raise
            return self.origin.fault(path, kind, "damaged", str(error))
