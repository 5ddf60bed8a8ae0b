"""Token shards: Megatron's `.bin/.idx` pair, memory-mapped, and not used before it is whole.

`.bin` is the tokens of all documents, one after the other. `.idx` is: magic (9 bytes), version (u64), dtype code (u8),
number of sequences (u64), number of document bounds (u64), then length of each sequence in tokens (i32), its byte
offset (i64), and the document bounds in sequences (i64). Here a document is one sequence and ends with the
end-of-text token.

Shape suffixes: D documents, T tokens of the shard.
"""

import mmap
import os
import shutil
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from conf.errors import LongrunError
from data_pipeline.artifact import Artifact, sha256_of
from data_pipeline.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Megatron's dtype codes; its floating-point ones (6, 7) cannot hold tokens."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 2**24
"""Bytes, tokens or documents that are handled at a time."""
CHECKSUMMED_BYTES = 32 * 2**20
"""Files up to this size are read through once when they are opened (0.03 s); larger ones are compared by size and by
samples of the index, and by `Artifact.verify` when that is asked for."""
SAMPLED = 64
"""Documents, evenly spaced, whose entries in the index are compared when it is opened: 10^12 tokens open at once."""


class ShardError(LongrunError):
    """A shard is missing, cut short, damaged, or made for another tokenizer or vocabulary."""


class ShardWriter:
    """Writes `<stem>.bin`, `<stem>.idx`, batch by batch; the pair is whole after `close`.

    Args:
        stem: path without ending.
        dtype: of the tokens.
    """

    def __init__(self, stem: Path, dtype: type[np.integer]):
        self.stem = stem
        self.dtype = dtype
        self.lengths: list[NDArray[np.int32]] = []
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.tokens = open(_ending(stem, ".bin"), "wb")  # noqa: SIM115  # closed by `close`

    def write(self, documents: Sequence[NDArray[np.integer]]) -> None:
        """Append documents, each with its end-of-text token."""
        if documents:
            self.tokens.write(np.concatenate(documents).astype(self.dtype, copy=False).tobytes())
            self.lengths.append(np.fromiter(map(len, documents), np.int32, len(documents)))

    def close(self) -> None:
        self.tokens.flush()
        os.fsync(self.tokens.fileno())
        self.tokens.close()
        _write_index(_ending(self.stem, ".idx"), self.dtype, lambda: self.lengths)


def merge(pieces: Sequence[Path], stem: Path) -> None:
    """Write the documents of all pieces, in order, as one shard `<stem>.bin`, `<stem>.idx`.

    Both appear under their names only when they are whole, the index last. Memory does not grow with the shard.

    Args:
        pieces: one or more shards of the same dtype, as paths without ending.
        stem: path without ending.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    with open(_ending(stem, ".bin.part"), "wb") as tokens:
        for piece in pieces:
            with open(_ending(piece, ".bin"), "rb") as source:
                shutil.copyfileobj(source, tokens, CHUNK)
        tokens.flush()
        os.fsync(tokens.fileno())

    def lengths() -> Iterator[NDArray[np.int32]]:
        for piece in pieces:
            _, lengths_D = _index(piece)
            yield from (lengths_D[begin : begin + CHUNK] for begin in range(0, len(lengths_D), CHUNK))

    (dtype,) = {_index(piece)[0] for piece in pieces}
    _write_index(_ending(stem, ".idx.part"), dtype, lengths)
    for ending in (".bin", ".idx"):
        os.replace(_ending(stem, ending + ".part"), _ending(stem, ending))


def _write_index(file: Path, dtype: type[np.integer], lengths: Callable[[], Iterable[NDArray[np.int32]]]) -> None:
    """Write an index.

    Args:
        file: where.
        dtype: of the tokens.
        lengths: gives the documents' lengths in tokens, in parts; called once for each pass over them.
    """
    count, end = sum(map(len, lengths())), 0
    with open(file, "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], count, count + 1))
        for lengths_D in lengths():
            index.write(lengths_D.tobytes())
        for lengths_D in lengths():
            ends_D = end + np.cumsum(lengths_D, dtype=np.int64)
            index.write(((ends_D - lengths_D) * np.dtype(dtype).itemsize).tobytes())
            end = int(ends_D[-1])
        for begin in range(0, count + 1, CHUNK):
            index.write(np.arange(begin, min(begin + CHUNK, count + 1), dtype=np.int64).tobytes())
        index.flush()
        os.fsync(index.fileno())


def _index(stem: Path) -> tuple[type[np.integer], NDArray[np.int32]]:
    """The dtype of a shard of ours, and the lengths of its documents."""
    file = _ending(stem, ".idx")
    with open(file, "rb") as stream:
        _, _, code, count, _ = HEADER.unpack(stream.read(HEADER.size))
    return DTYPES[code], _mapped(file, np.int32, HEADER.size, count)


class Shard:
    """A memory-mapped shard whose two files fit each other. Opening reads the same few entries whatever its size.

    Args:
        stem: path without ending.

    Raises:
        ShardError: a file is missing, is no Megatron shard, is cut short, or index and tokens contradict each other.
    """

    def __init__(self, stem: str | Path):
        self.stem = Path(stem)
        index, tokens = _ending(self.stem, ".idx"), _ending(self.stem, ".bin")
        if absent := [str(f) for f in (index, tokens) if not f.exists()]:
            raise ShardError(f"{' and '.join(absent)} missing; build the corpus again with `python -m data_pipeline`.")
        size = index.stat().st_size
        if size < HEADER.size:
            raise ShardError(
                f"{index} has {size} bytes, a header alone has {HEADER.size}; it was cut short. Build it again."
            )
        with open(index, "rb") as stream:
            magic, version, code, sequences, bounds = HEADER.unpack(stream.read(HEADER.size))
        if magic != MAGIC or version != VERSION:
            raise ShardError(
                f"{index} is no Megatron index: it begins with {magic!r}, version {version}; "
                f"{MAGIC!r}, version {VERSION} was expected. Give a corpus that `python -m data_pipeline` wrote."
            )
        if code not in DTYPES:
            raise ShardError(f"{index} has dtype code {code}, tokens have one of {sorted(DTYPES)}; build it again.")
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size != expected:
            raise ShardError(f"{index} has {size} bytes, its header promises {expected}; it was cut. Build it again.")
        self.dtype: type[np.integer] = DTYPES[code]
        self._width = width = np.dtype(self.dtype).itemsize
        self.lengths_D: NDArray[np.int32] = _mapped(index, np.int32, HEADER.size, sequences)
        self._offsets_D: NDArray[np.int64] = _mapped(index, np.int64, HEADER.size + 4 * sequences, sequences)
        count = int(self._offsets_D[-1]) // width + int(self.lengths_D[-1]) if sequences else 0
        found = tokens.stat().st_size
        self._check_sample()
        if found != count * width:
            raise ShardError(
                f"{tokens} has {found} bytes, its index promises {count} tokens of {width} bytes = {count * width}; "
                "it was cut short or belongs to another index. Build it again."
            )
        self._map: mmap.mmap | None = None  # no file of no bytes can be mapped
        self.tokens_T: NDArray[np.integer] = np.zeros(0, self.dtype)
        if count:
            with open(tokens, "rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self.tokens_T = np.frombuffer(self._map, self.dtype)

    def _check_sample(self) -> None:
        """Compare lengths and offsets of some documents; that the last one ends with the file is seen elsewhere."""
        last = self.documents - 1
        numbers_N = np.linspace(0, max(0, last), min(self.documents, SAMPLED)).astype(np.int64)
        lengths_N, nexts_N = self.lengths_D[numbers_N], np.minimum(numbers_N + 1, last)
        ends_N = self._offsets_D[numbers_N] + lengths_N.astype(np.int64) * self._width
        fitting_N = (self._offsets_D[nexts_N] == ends_N) | (numbers_N == last)
        if self.documents and (self._offsets_D[0] != 0 or (lengths_N < 0).any() or not fitting_N.all()):
            index = _ending(self.stem, ".idx")
            raise ShardError(f"{index}: lengths and offsets contradict each other; it is damaged. Build it again.")

    @property
    def documents(self) -> int:
        return len(self.lengths_D)

    def starts(self, first: int, stop: int) -> NDArray[np.int64]:
        """Places in the token stream where documents first ... stop - 1 begin."""
        return self._offsets_D[first:stop] // self._width

    def document_at(self, place: int) -> int:
        """The number of the document that holds this place of the token stream, found by bisection."""
        return bisect_right(self._offsets_D, place * self._width) - 1  # type: ignore[arg-type]

    def document(self, number: int) -> NDArray[np.integer]:
        """The tokens of one document, end-of-text included."""
        begin = int(self._offsets_D[number]) // self._width
        return self.tokens_T[begin : begin + int(self.lengths_D[number])]

    def scattered(self) -> None:
        """Tell the kernel that reads are here and there: reading on around them would cost many times as much."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_RANDOM)

    def announce(self, begin: int, count: int) -> None:
        """Let the kernel fetch these tokens of a scattered read, and return at once."""
        if self._map is not None:
            first = begin * self._width // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, (begin + count) * self._width - first)

    def chunks(self) -> Iterable[NDArray[np.integer]]:
        """All tokens, in pieces that fit in memory."""
        for begin in range(0, len(self.tokens_T), CHUNK):
            yield self.tokens_T[begin : begin + CHUNK]


def stem_of(corpus: Artifact, split: str) -> Path:
    """The stem of a split's shard.

    Raises:
        ShardError: the corpus has no such split.
    """
    if split not in (splits := corpus.metrics["splits"]):
        raise ShardError(f"{corpus.path} has no split {split!r}; it has {', '.join(sorted(splits))}.")
    return corpus.path / "shards" / split


def open_shard(path: str | Path, split: str, tokenizer: Tokenizer) -> tuple[Shard, Artifact]:
    """A split of a corpus artifact, checked against its manifest and against the tokenizer that will be used.

    Raises:
        ArtifactError: `path` is no finished corpus.
        ShardError: the split does not exist, was damaged after it was made, or was made with another tokenizer.
    """
    artifact = Artifact.read(path, kind="corpus")
    stem = stem_of(artifact, split)
    splits = artifact.metrics["splits"]
    made_with = artifact.facts["tokenizer"]
    if made_with["fingerprint"] != tokenizer.fingerprint:
        raise ShardError(
            f"{path} was tokenised with tokenizer {made_with['fingerprint']} ({made_with['vocabulary']} ids), but "
            f"{tokenizer.source} is {tokenizer.fingerprint} ({tokenizer.vocabulary} ids): the numbers would mean other "
            f"words. Use the tokenizer in {Path(path) / 'tokenizer'}, or build the corpus with "
            f"`corpus.tokenizer={tokenizer.source}`."
        )
    if splits[split]["largest_token"] >= tokenizer.vocabulary:
        raise ShardError(
            f"{path} holds token {splits[split]['largest_token']}, the vocabulary ends at {tokenizer.vocabulary - 1}; "
            "build the corpus again with this tokenizer."
        )
    for ending in (".idx", ".bin"):
        file = _ending(stem, ending)
        record = artifact.files.get(f"shards/{file.name}")
        if record is None:
            raise ShardError(f"{file} is not in the manifest of {path}: it comes from elsewhere. Build it again.")
        if not file.exists():
            raise ShardError(f"{file} is missing, its manifest lists it; build the corpus again.")
        if (found := file.stat().st_size) != record["bytes"]:
            raise ShardError(
                f"{file} has {found} bytes, its manifest says {record['bytes']}: it was cut short or replaced. "
                "Build the corpus again."
            )
        if found <= CHECKSUMMED_BYTES and sha256_of(file) != record["sha256"]:
            raise ShardError(
                f"{file} is not the file that was made (its checksum differs from the manifest's): it was damaged or "
                "replaced. Build the corpus again."
            )
    return Shard(stem), artifact


def _mapped(file: Path, dtype: type[np.integer], offset: int, count: int) -> NDArray:
    if not count:
        return np.zeros(0, dtype)
    # A plain array over the map: memmap's own indexing costs microseconds.
    return np.asarray(np.memmap(file, mode="r", dtype=dtype, offset=offset, shape=(count,)))


def _ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)
