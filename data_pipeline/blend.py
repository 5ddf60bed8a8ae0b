"""Which sample of which source stands at position k of a run: a function of weights, caps, stages and k.

A run is a row of segments, found once when it is opened: a new one begins with each stage, and where a source has given
all it may; the others then share the rest in the proportion of their weights. A segment is a row of blocks of K
samples. Through b blocks, source s has given floor(W_s b K) - floor(W_{s-1} b K) samples, W being cumulative shares: it
is never a whole sample away from its share. Where in a block they stand is a keyed permutation. A source gives its
samples in order, so none comes a second time before all have come once.

Nothing is stored, and any position costs one block.

Shape suffixes: S sources, K samples of a block, N positions asked for, R lengths of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from conf.errors import LongrunError
from data_pipeline.artifact import fingerprint
from data_pipeline.order import LONGEST, Order

UNIT = 2**31
"""Shares are whole numbers of 1/UNIT, so that counts of up to 2^62 samples are exact in 64 bits."""
LEAST_BLOCK = 1024
LEAST_SHARE = 1e-5
"""A block has at least two samples of each source, so this bounds its length and the time to find a position."""
BLOCKS_KEPT = 64


class ExhaustedError(LongrunError):
    """Every source has given all it may."""


@dataclass(frozen=True)
class Stage:
    """From `begin` on, samples are drawn with these weights.

    Args:
        begin: position in the run, in samples.
        weights: of each source; >= 0, and not all of them 0.
    """

    begin: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Segment:
    """Positions [begin, end) of a run, over which shares are constant.

    Args:
        begin: first position.
        end: first position after it.
        taken_S: samples that each source has given before.
        bounds_S: cumulative shares in 1/UNIT; the last is UNIT.
        block: samples of a block, K; the last block may be shorter.
    """

    begin: int
    end: int
    taken_S: NDArray[np.int64]
    bounds_S: NDArray[np.int64]
    block: int

    @property
    def whole_blocks(self) -> int:
        return (self.end - self.begin) // self.block

    def before(self, block: int) -> NDArray[np.int64]:
        """Samples that each source has given before a block of this segment."""
        return self.taken_S + _shares(self.bounds_S, np.int64(block * self.block))

    def counts(self, block: int) -> NDArray[np.int64]:
        """Samples of each source in a block."""
        if block < self.whole_blocks:
            return self.before(block + 1) - self.before(block)
        return _shares(self.bounds_S, np.int64((self.end - self.begin) % self.block))

    def after(self) -> NDArray[np.int64]:
        """Samples that each source has given when the segment ends."""
        return self.before(self.whole_blocks) + self.counts(self.whole_blocks)


def segments(caps: Sequence[int], stages: Sequence[Stage]) -> list[Segment]:
    """The segments of a run, until it ends: at 2^62 samples, or where no source that has a weight may give more.

    Args:
        caps: samples that each source may give.
        stages: the first begins at 0, each later one after the one before.
    """
    found: list[Segment] = []
    taken_S, begin = np.zeros(len(caps), np.int64), 0
    caps_S = np.minimum(np.array(caps, dtype=np.int64), LONGEST)
    ends = [stage.begin for stage in stages[1:]] + [LONGEST]
    for stage, end in zip(stages, ends, strict=True):
        while begin < end:
            weights_S = np.where(taken_S < caps_S, stage.weights, 0.0)
            if not weights_S.any():
                return found
            segment = _segment(begin, end, taken_S, weights_S, caps_S - taken_S)
            found.append(segment)
            taken_S, begin = segment.after(), segment.end
    return found


def _segment(
    begin: int, end: int, taken_S: NDArray[np.int64], weights_S: NDArray[np.float64], left_S: NDArray[np.int64]
) -> Segment:
    """The longest segment within [begin, end) that takes from no source more than is left of it."""
    bounds_S = np.round(np.cumsum(weights_S) / weights_S.sum() * UNIT).astype(np.int64)
    least = np.diff(bounds_S, prepend=0)[weights_S > 0].min()
    block = max(LEAST_BLOCK, 1 << int(-(-2 * UNIT // least) - 1).bit_length())
    low, high = 0, (end - begin) // block  # whole blocks that surely fit, and that may
    while low < high:
        middle = (low + high + 1) // 2
        fits = (_shares(bounds_S, np.int64(middle * block)) <= left_S).all()
        low, high = (middle, high) if fits else (low, middle - 1)
    left_S = left_S - _shares(bounds_S, np.int64(low * block))
    lengths_R = np.arange(min(block, end - begin - low * block + 1))
    rest = np.flatnonzero((_shares(bounds_S, lengths_R[:, None]) <= left_S).all(axis=1))[-1]
    return Segment(begin, begin + low * block + int(rest), taken_S, bounds_S, block)


def _shares(bounds_S: NDArray[np.int64], count: NDArray[np.int64] | np.int64) -> NDArray[np.int64]:
    """Of so many samples, those of each source: differences of floor(bounds_S * count / UNIT), without overflow."""
    units, rest = count // UNIT, count % UNIT
    return np.diff(bounds_S * units + bounds_S * rest // UNIT, prepend=0)


class Blend:
    """`blend[ks]` is, for each position, the source and which of its samples comes: the first is 0.

    Args:
        caps: samples that each source may give.
        stages: see `segments`.
        seed: another seed gives another order.
    """

    def __init__(self, caps: Sequence[int], stages: Sequence[Stage], seed: int):
        self.segments = segments(caps, stages)
        self.length = self.segments[-1].end if self.segments else 0
        self.seed = seed
        self._begins = np.array([segment.begin for segment in self.segments])
        self._block = lru_cache(BLOCKS_KEPT)(self._made)

    def __getitem__(self, ks: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and running number within it, for positions 0 <= k < length.

        Raises:
            ExhaustedError: a position lies behind the last.
        """
        ks_N = np.asarray(ks, dtype=np.int64)
        if ks_N.size and ks_N.max() >= self.length:
            raise ExhaustedError(
                f"sample {ks_N.max()} of the mixture does not exist: its sources may give {self.length} together. "
                "Raise their caps (epochs, tokens), or train for fewer steps."
            )
        sources_N, numbers_N = np.empty_like(ks_N), np.empty_like(ks_N)
        segments_N = np.searchsorted(self._begins, ks_N, side="right") - 1
        for number in np.unique(segments_N).tolist():
            segment = self.segments[number]
            here = np.flatnonzero(segments_N == number)
            blocks, places = np.divmod(ks_N[here] - segment.begin, segment.block)
            for block in np.unique(blocks).tolist():
                chosen = blocks == block
                sources_K, numbers_K = self._block(number, block)
                sources_N[here[chosen]] = sources_K[places[chosen]]
                numbers_N[here[chosen]] = numbers_K[places[chosen]]
        return sources_N, numbers_N

    def taken(self, k: int) -> NDArray[np.int64]:
        """Samples that each source has given before position 0 <= k <= length."""
        if k == self.length:
            return self.segments[-1].after()
        number = int(np.searchsorted(self._begins, k, side="right")) - 1
        segment = self.segments[number]
        block, place = divmod(k - segment.begin, segment.block)
        sources_K, _ = self._block(number, block)
        return segment.before(block) + np.bincount(sources_K[:place], minlength=len(segment.taken_S))

    def _made(self, number: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and running number of each sample of a block."""
        segment = self.segments[number]
        counts_S = segment.counts(block)
        size, ends_S = int(counts_S.sum()), np.cumsum(counts_S)
        whole = block < segment.whole_blocks
        order = Order(size, int(fingerprint([self.seed, "blend", segment.begin, whole]), 16))
        slots_K = order[(block * size if whole else 0) + np.arange(size)]
        sources_K = np.searchsorted(ends_S, slots_K, side="right")
        by_source = np.argsort(sources_K, kind="stable")
        numbers_K = np.empty(size, np.int64)
        numbers_K[by_source] = np.arange(size) + np.repeat(segment.before(block) - (ends_S - counts_S), counts_S)
        return sources_K, numbers_K
