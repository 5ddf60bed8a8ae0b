"""In which order samples are visited: a permutation per epoch that is computed, never stored.

A Feistel network is a permutation of the integers below 2^(2h) whatever its round function is (Luby & Rackoff 1988).
Cycle walking restricts it to [0, length): an image outside is permuted again until it falls inside (Black & Rogaway
2002). So sample k of a run is a pure function of (seed, length, k): a resume needs no state but k, a data set of 10^12
samples opens at once, and every epoch is another permutation.
"""

from collections.abc import Sequence, Sized
from typing import overload

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
LEAST_HALF = 3
"""Bits: with halves of two, some permutations of five samples come twice as often as others."""
LONGEST = 2**62
NAME = int.from_bytes(b"longrun", "big")
"""Mixed into every seed."""


class Orders:
    """`orders[s, k]` is the index of the k-th sample of an endless run over the samples of source s.

    Args:
        lengths: number of samples of each source; 1 <= length <= 2^62.
        seeds: of each source; another seed gives another order.
    """

    def __init__(self, lengths: Sequence[int], seeds: Sequence[int]):
        for length in lengths:
            if not 1 <= length <= LONGEST:
                raise ValueError(f"an order needs between 1 and 2^62 samples, not {length}")
        self.lengths_S = np.array(lengths, dtype=np.int64)
        halves = [max(LEAST_HALF, ((length - 1).bit_length() + 1) // 2) for length in lengths]
        self._halves_S = np.array(halves, dtype=np.uint64)
        self._keys_S = _scramble(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64) ^ np.uint64(NAME))

    def __getitem__(self, where: tuple[NDArray[np.integer], NDArray[np.integer]]) -> NDArray[np.int64]:
        """Indices of the samples at positions k >= 0; epoch e covers [e * length, (e + 1) * length)."""
        sources, ks = where
        if ks.size and ks.min() < 0:
            raise IndexError(f"sample {ks.min()} does not exist: positions count from 0")
        lengths = self.lengths_S[sources]
        epochs, positions = np.divmod(ks, lengths)
        halves, keys = self._halves_S[sources], _scramble(self._keys_S[sources] + epochs.astype(np.uint64))
        images = positions.astype(np.uint64)
        outside = np.arange(ks.size)
        while outside.size:  # the domain is at most 4 times the length (or 64), so few walk far
            images[outside] = _permute(images[outside], keys[outside], halves[outside])
            outside = outside[images[outside] >= lengths[outside]]
        return images.astype(np.int64)


class Order:
    """`order[k]` is the index of the k-th sample of an endless run over `length` samples.

    Args:
        length: number of samples; 1 <= length <= 2^62.
        seed: another seed gives another order.
    """

    def __init__(self, length: int, seed: int):
        self.length = length
        self._orders = Orders([length], [seed])

    @overload
    def __getitem__(self, k: int) -> int: ...
    @overload
    def __getitem__(self, k: NDArray[np.integer]) -> NDArray[np.int64]: ...

    def __getitem__(self, k):
        """Index of the sample at position k >= 0, or at each of several."""
        ks = np.atleast_1d(np.asarray(k, dtype=np.int64))
        indices = self._orders[np.zeros_like(ks), ks]
        return indices if np.ndim(k) else int(indices[0])


class AsNumbered:
    """The order of samples that are numbered by their position in the run: they know themselves what comes when."""

    @overload
    def __getitem__(self, k: int) -> int: ...
    @overload
    def __getitem__(self, k: NDArray[np.integer]) -> NDArray[np.int64]: ...

    def __getitem__(self, k):
        return k


def order_of(samples: Sized, seed: int) -> Order | AsNumbered:
    """In which order a run visits samples: their own (`samples.order`) where they have one."""
    return getattr(samples, "order", None) or Order(len(samples), seed)


def _permute(values: NDArray[np.uint64], keys: NDArray[np.uint64], halves: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left, right, surplus = values >> halves, values & ((np.uint64(1) << halves) - np.uint64(1)), np.uint64(64) - halves
    for _ in range(ROUNDS):
        keys = _scramble(keys)
        left, right = right, left ^ (_scramble(keys ^ right) >> surplus)
    return (left << halves) | right


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al. 2014): neighbouring inputs give unrelated outputs. Arithmetic is modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
