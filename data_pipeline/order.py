"""In which order samples are visited: a permutation per epoch that is computed, never stored.

A Feistel network is a permutation of the integers below 2^(2h) whatever its round function is (Luby & Rackoff 1988).
Cycle walking restricts it to [0, length): an image outside is permuted again until it falls inside (Black & Rogaway
2002). So sample k of a run is a pure function of (seed, length, k): a resume needs no state but k, a data set of 10^12
samples opens at once, and every epoch is another permutation.
"""

from typing import overload

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
LEAST_HALF = 3
"""Bits: with halves of two, some permutations of five samples come twice as often as others."""
LONGEST = 2**62


class Order:
    """`order[k]` is the index of the k-th sample of an endless run over `length` samples.

    Args:
        length: number of samples; 1 <= length <= 2^62.
        seed: another seed gives another order.
    """

    def __init__(self, length: int, seed: int):
        if not 1 <= length <= LONGEST:
            raise ValueError(f"an order needs between 1 and 2^62 samples, not {length}")
        self.length = length
        self._half = np.uint64(max(LEAST_HALF, ((length - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._key = _scramble(np.uint64(seed % 2**64) ^ np.uint64(0x6C6F6E6772756E))

    @overload
    def __getitem__(self, k: int) -> int: ...
    @overload
    def __getitem__(self, k: NDArray[np.integer]) -> NDArray[np.int64]: ...

    def __getitem__(self, k):
        """Indices of the samples at positions k >= 0; epoch e covers [e * length, (e + 1) * length)."""
        ks = np.atleast_1d(np.asarray(k, dtype=np.int64))
        if ks.size and ks.min() < 0:
            raise IndexError(f"sample {ks.min()} does not exist: positions count from 0")
        epochs, positions = np.divmod(ks, self.length)
        keys = _scramble(self._key + epochs.astype(np.uint64))
        images = positions.astype(np.uint64)
        outside = np.arange(ks.size)
        while outside.size:  # the domain is at most 4 times the length (or 64), so few walk far
            images[outside] = self._permute(images[outside], keys[outside])
            outside = outside[images[outside] >= self.length]
        return images.astype(np.int64) if np.ndim(k) else int(images[0])

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for _ in range(ROUNDS):
            keys = _scramble(keys)
            left, right = right, left ^ (_scramble(keys ^ right) >> np.uint64(64 - int(self._half)))
        return (left << self._half) | right


def _scramble(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al. 2014): neighbouring inputs give unrelated outputs. Arithmetic is modulo 2^64."""
    x = np.atleast_1d(np.asarray(x, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
