"""Files of records: JSON lines (plain, .gz, .zst), one JSON array, Parquet. What cannot be read is told, row by row.

A row is fit when it can be written as a line of JSON in UTF-8 and holds nothing that other programs choke on.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import LongrunError

LONGEST_LINE = 2**26
"""Bytes of a line; what is longer is no record."""
DEEPEST = 64
"""Objects and lists within each other."""
CHUNK = 2**20
SHOWN = 200
"""Characters of an unfit row that are kept."""


class FileError(LongrunError):
    """A file of records is damaged or of an unknown kind."""


@dataclass(frozen=True)
class Row:
    """One record of a file, or why there is none.

    Args:
        number: the line in the file, or the place in its array or table, from 1.
        value: the record.
        reason: why it is unfit, in snake_case; empty where it is fit.
        fault: the same in words: "found; expected".
        beginning: the first characters of an unfit row.
    """

    number: int
    value: Any = None
    reason: str = ""
    fault: str = ""
    beginning: str = ""


class UnfitRowError(Exception):
    """Why a row is no record: `reason` in snake_case, `fault` in words."""

    def __init__(self, reason: str, fault: str):
        self.reason, self.fault = reason, fault


def rows(file: Path) -> Iterator[Row]:
    """Every row of a file. A line that is blank is none.

    Raises:
        FileError: the file is cut off or damaged, so that rows would be lost; or its ending is unknown.
    """
    kind = next((ending for ending in READERS if file.name.endswith(ending)), None)
    if kind is None:
        raise FileError(f"{file} ends in none of {', '.join(READERS)}; convert it to one of them.")
    try:
        yield from READERS[kind](file)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises any of the three
        raise FileError(f"{file} cannot be read to its end ({error}); copy it again from where it came.") from error


def parsed(line: bytes) -> Any:
    """The value of one line of JSON.

    Raises:
        UnfitRowError: says why it is no record.
    """
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise UnfitRowError(
            "not_utf8", f"byte {byte:#04x} at {error.start} is not UTF-8; expected a line in UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        fault = f"not JSON ({error.msg} at column {error.colno}); expected one object per line"
        raise UnfitRowError("not_json", fault) from error
    except ValueError as error:  # a number of thousands of digits
        raise UnfitRowError("not_json", f"not JSON ({error}); expected one object per line") from error
    except RecursionError as error:
        raise UnfitRowError("too_deep", f"nested too deeply; expected at most {DEEPEST} levels") from error
    check(value)
    return value


def check(value: Any, level: int = 0) -> None:
    """Raise UnfitRowError where a value, or one within it, cannot be written as JSON in UTF-8."""
    if isinstance(value, str):
        if "\0" in value:
            raise UnfitRowError("nul", f"a NUL character in {value[:40]!r}; expected text without")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise UnfitRowError("not_unicode", f"half of a surrogate pair in {value[:40]!r}; expected whole characters")
    elif isinstance(value, dict | list):
        if level == DEEPEST:
            raise UnfitRowError("too_deep", f"nested too deeply; expected at most {DEEPEST} levels")
        for inner in value if isinstance(value, list) else [*value, *value.values()]:
            check(inner, level + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UnfitRowError("not_json", f"the number {value}; expected a finite one")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise UnfitRowError("not_json", f"a value of type {type(value).__name__}; expected what JSON can say")


def _no_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def _lines(chunks: Iterator[bytes]) -> Iterator[tuple[bytes, int]]:
    """Lines, of which no more is kept than may be long, and how long each is."""
    kept, length = bytearray(), 0
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            kept += part[: LONGEST_LINE - len(kept)]
            yield bytes(kept), length + len(part)
            kept.clear()
            length = 0
        kept += rest[: LONGEST_LINE - len(kept)]
        length += len(rest)
    if length:
        yield bytes(kept), length


def _json_lines(chunks_of: Callable[[Path], Iterator[bytes]]) -> Callable[[Path], Iterator[Row]]:
    def read(file: Path) -> Iterator[Row]:
        for number, (line, length) in enumerate(_lines(chunks_of(file)), 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                if length > LONGEST_LINE:
                    raise UnfitRowError("too_long", f"a line of {length:,} bytes; expected at most {LONGEST_LINE:,}")
                if line.strip():
                    yield Row(number, parsed(line))
            except UnfitRowError as unfit:
                beginning = line[: 4 * SHOWN].decode("utf-8", errors="replace")[:SHOWN]
                yield Row(number, None, unfit.reason, unfit.fault, beginning)

    return read


def _plain(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _gzip(file: Path) -> Iterator[bytes]:
    with gzip.open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _zstd(file: Path) -> Iterator[bytes]:
    """Frame by frame: the library's own stream ends without a word where a frame is cut off."""
    import zstandard

    frame, begun = None, False
    try:
        for chunk in _plain(file):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                begun = not frame.eof
                chunk, frame = (b"", frame) if begun else (frame.unused_data, None)
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if begun:
        raise EOFError("it ends within a frame")


def _array(file: Path) -> Iterator[Row]:
    try:
        value = json.loads(file.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise FileError(f"{file} is not JSON ({str(error)[:200]}); lines of JSON belong in a .jsonl.") from error
    if not isinstance(value, list):
        raise FileError(f"{file} holds one {type(value).__name__}; expected an array of records.")
    yield from _checked(value)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        yield from _checked(
            _without_nulls(row) for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist()
        )
    except (pyarrow.ArrowException, ValueError) as error:
        raise OSError(str(error)[:200]) from error


def _without_nulls(value: Any) -> Any:
    """A table has a null wherever a record has no such key: every call then has the arguments of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _checked(values: Any) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        try:
            check(value)
        except UnfitRowError as unfit:
            yield Row(number, None, unfit.reason, unfit.fault, ascii(value)[:SHOWN])
        else:
            yield Row(number, value)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines(_plain),
    ".jsonl.gz": _json_lines(_gzip),
    ".jsonl.zst": _json_lines(_zstd),
    ".json": _array,
    ".parquet": _parquet,
}
"""Ending of a file's name -> what reads it."""
