"""Which tokens of which documents a window holds: a function of its number and the lengths of the documents.

A window of L inputs is made in one of these ways:

- `Stream`: documents one after the other, cut every L tokens. Nothing need be known but where documents begin.
- `Trimmed`: the same stream of documents that were first cut to one window, or dropped where they are longer.
- `BestFit`: documents share windows and none is cut that fits into one (Ding et al. 2024, arXiv:2404.10830).

The last two count once what each block of documents gives; a window is then made from its own block.

Shape suffixes: D documents, S spans of a window, B blocks.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.packing import best_fit_decreasing
from data_pipeline.shards import Shard, ShardError

log = logging.getLogger(__name__)

LONG_DOCUMENTS = ("split", "cut", "drop")
BLOCK = 2048
"""Documents that are packed together: a window costs about a millisecond, and few windows are left half empty."""
BLOCKS_KEPT = 256


@dataclass(frozen=True)
class Spans:
    """What a window holds, in order.

    Args:
        documents_S: number of the document in the shard.
        sources_S: place of the first input in the shard's token stream.
        inputs_S: number of inputs; at least 1.
        ending_S: whether the last input ends its document, so that it predicts nothing.
    """

    documents_S: NDArray[np.int64]
    sources_S: NDArray[np.int64]
    inputs_S: NDArray[np.int64]
    ending_S: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Windows(Protocol):
    """The windows of a shard, by number."""

    shard: Shard
    sequence_length: int

    def __len__(self) -> int: ...

    def spans(self, index: int) -> Spans: ...

    def around(self, document: int) -> range:
        """Windows among which are all that hold a document."""
        ...


class Stream:
    """Window i predicts tokens i*L + 1 ... (i + 1)*L of the shard from those before them.

    Args:
        shard: where the tokens are.
        sequence_length: inputs per window, L.
    """

    def __init__(self, shard: Shard, sequence_length: int):
        self.shard = shard
        self.sequence_length = sequence_length
        self.tokens = len(shard.tokens_T)

    def __len__(self) -> int:
        return max(0, -(-(self.tokens - 1) // self.sequence_length))

    def spans(self, index: int) -> Spans:
        begin, end = self._bounds(index)
        first, stop = self.shard.document_at(begin), self.shard.document_at(end - 1) + 1
        starts_D = self.shard.starts(first, stop)
        return _within(np.arange(first, stop), starts_D, starts_D, self.shard.lengths_D[first:stop], begin, end)

    def around(self, document: int) -> range:
        begin = int(self.shard.starts(document, document + 1)[0])
        return self._touched(begin, begin + int(self.shard.lengths_D[document]))

    def _touched(self, begin: int, end: int) -> range:
        """Windows that hold inputs of a part of the stream."""
        return range(begin // self.sequence_length, min(len(self), -(-end // self.sequence_length)))

    def _bounds(self, index: int) -> tuple[int, int]:
        """Of a window's inputs in the stream. The last token of all is never an input: nothing follows it."""
        begin = index * self.sequence_length
        return begin, min(begin + self.sequence_length, self.tokens - 1)


class Trimmed(Stream):
    """A stream without what does not fit into one window: L inputs, L + 1 tokens.

    Args:
        shard: where the tokens are.
        sequence_length: inputs per window, L.
        long_documents: "cut" keeps the first L + 1 tokens of a longer document, "drop" nothing.
        counted: gives the tokens per block, given the function that counts those of one.
    """

    def __init__(self, shard: Shard, sequence_length: int, long_documents: str, counted: "Counted"):
        super().__init__(shard, sequence_length)
        self.long_documents = long_documents
        self._counts_B = counted(lambda block: int(self._lengths(block).sum()), _blocks(shard))
        self._ends_B = np.cumsum(self._counts_B)
        self.tokens = int(self._ends_B[-1]) if len(self._ends_B) else 0

    def spans(self, index: int) -> Spans:
        begin, end = self._bounds(index)
        parts: list[Spans] = []
        block = int(np.searchsorted(self._ends_B, begin, side="right"))
        while block < len(self._ends_B) and (before := int(self._ends_B[block] - self._counts_B[block])) < end:
            lengths_D = self._lengths(block)
            _check(self.shard, int(lengths_D.sum()), int(self._counts_B[block]))
            first, stop = _documents(self.shard, block)
            starts_D = before + np.cumsum(lengths_D) - lengths_D
            sources_D = self.shard.starts(first, stop)
            parts.append(_within(np.arange(first, stop), sources_D, starts_D, lengths_D, begin, end))
            block += 1
        return Spans.joined(parts)

    def around(self, document: int) -> range:
        block = document // BLOCK
        return self._touched(int(self._ends_B[block] - self._counts_B[block]), int(self._ends_B[block]))

    def _lengths(self, block: int) -> NDArray[np.int64]:
        """What is kept of each document of a block, in tokens."""
        lengths_D = self.shard.lengths_D[slice(*_documents(self.shard, block))].astype(np.int64)
        return _trimmed(lengths_D, self.sequence_length + 1, self.long_documents)


@dataclass(frozen=True)
class _Pack:
    """The windows of one block: first those that one document fills alone, then the shared ones."""

    filled_D: NDArray[np.int64]
    """Windows that each document fills."""
    rests_D: NDArray[np.int64]
    """Inputs of each document in a shared window; 0 where it has none."""
    shared: list[list[int]]
    """Documents of each shared window, by their number in the block."""

    def __len__(self) -> int:
        return int(self.filled_D.sum()) + len(self.shared)


class BestFit:
    """Documents share windows, each in the fullest that has room for it; only documents longer than a window are cut.

    Every token but a document's first is predicted once; what would predict nothing, a document's last, is no input.

    Args:
        shard: where the tokens are.
        sequence_length: inputs per window, L.
        long_documents: a longer document is "split": it fills windows alone, and its end shares one; "cut": its
            beginning fills one; "drop": it is left out.
        counted: gives the windows per block, given the function that counts those of one.
    """

    def __init__(self, shard: Shard, sequence_length: int, long_documents: str, counted: "Counted"):
        self.shard = shard
        self.sequence_length = sequence_length
        self.long_documents = long_documents
        self._pack = lru_cache(BLOCKS_KEPT)(self._packed)
        self._counts_B = counted(lambda block: len(self._packed(block)), _blocks(shard))
        self._ends_B = np.cumsum(self._counts_B)

    def __len__(self) -> int:
        return int(self._ends_B[-1]) if len(self._ends_B) else 0

    def spans(self, index: int) -> Spans:
        block = int(np.searchsorted(self._ends_B, index, side="right"))
        pack = self._pack(block)
        _check(self.shard, len(pack), int(self._counts_B[block]))
        within = index - int(self._ends_B[block] - self._counts_B[block])
        ends_D = np.cumsum(pack.filled_D)
        if within < ends_D[-1]:
            members_S = np.searchsorted(ends_D, [within], side="right")
            earlier_S = within - (ends_D - pack.filled_D)[members_S]
            inputs_S = np.array([self.sequence_length])
        else:
            members_S = np.array(pack.shared[within - int(ends_D[-1])])
            earlier_S, inputs_S = pack.filled_D[members_S], pack.rests_D[members_S]
        first, stop = _documents(self.shard, block)
        sources_S = self.shard.starts(first, stop)[members_S] + earlier_S * self.sequence_length
        return Spans(first + members_S, sources_S, inputs_S, np.zeros(len(members_S), dtype=bool))

    def around(self, document: int) -> range:
        block = document // BLOCK
        return range(int(self._ends_B[block] - self._counts_B[block]), int(self._ends_B[block]))

    def _packed(self, block: int) -> _Pack:
        lengths_D = self.shard.lengths_D[slice(*_documents(self.shard, block))].astype(np.int64)
        inputs_D = _trimmed(np.maximum(lengths_D - 1, 0), self.sequence_length, self.long_documents)
        filled_D, rests_D = np.divmod(inputs_D, self.sequence_length)
        sharing = np.flatnonzero(rests_D)
        windows = best_fit_decreasing(rests_D[sharing].tolist(), self.sequence_length, seed=block)
        return _Pack(filled_D, rests_D, [sharing[window].tolist() for window in windows])


class Counted(Protocol):
    """Applies a function to every block, or remembers what it gave."""

    def __call__(self, count: Callable[[int], int], blocks: int) -> NDArray[np.int64]: ...


def counted(count: Callable[[int], int], blocks: int) -> NDArray[np.int64]:
    """Every block, counted now."""
    return np.fromiter(map(count, range(blocks)), np.int64, blocks)


def remembered(file: Path) -> Counted:
    """The counts are kept in a file. Where it is gone or damaged, they are counted again."""

    def given(count: Callable[[int], int], blocks: int) -> NDArray[np.int64]:
        if file.exists():
            try:
                counts_B = np.load(file)
            except (OSError, ValueError, EOFError) as error:
                log.warning("%s cannot be read (%s): the documents are counted again", file, error)
            else:
                if counts_B.shape == (blocks,) and counts_B.dtype == np.int64:
                    return counts_B
                log.warning("%s does not hold %d counts: the documents are counted again", file, blocks)
        counts_B = counted(count, blocks)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(exist_ok=True)
            with open(temporary, "wb") as stream:
                np.save(stream, counts_B)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except OSError as error:
            log.warning("%s cannot be written (%s): the documents are counted again at the next start", file, error)
        return counts_B

    return given


def _blocks(shard: Shard) -> int:
    return -(-shard.documents // BLOCK)


def _documents(shard: Shard, block: int) -> tuple[int, int]:
    """First document of a block, and the first after it."""
    return block * BLOCK, min((block + 1) * BLOCK, shard.documents)


def _trimmed(lengths_D: NDArray[np.int64], most: int, long_documents: str) -> NDArray[np.int64]:
    if long_documents == "cut":
        return np.minimum(lengths_D, most)
    return np.where(lengths_D <= most, lengths_D, 0) if long_documents == "drop" else lengths_D


def _within(
    documents_D: NDArray[np.int64],
    sources_D: NDArray[np.int64],
    starts_D: NDArray[np.int64],
    lengths_D: NDArray[np.integer],
    begin: int,
    end: int,
) -> Spans:
    """The parts of documents between two places of a stream in which they begin at `starts_D`."""
    ends_D = starts_D + lengths_D
    from_D, to_D = np.maximum(starts_D, begin), np.minimum(ends_D, end)
    held = from_D < to_D
    ending = (to_D == ends_D)[held]
    return Spans(documents_D[held], (sources_D + from_D - starts_D)[held], (to_D - from_D)[held], ending)


def _check(shard: Shard, found: int, counted: int) -> None:
    if found != counted:
        raise ShardError(
            f"{shard.stem}: a block of documents gives {found}, its counts in {shard.stem.parent.parent / 'windows'} "
            f"say {counted}: one of them was damaged. Delete that directory, and verify the corpus with "
            "`python -m tools.lineage`."
        )
