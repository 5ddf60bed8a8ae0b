"""A model of bytes by the bytes before them, interpolated as Witten and Bell do: learnt in seconds from reference text.

    p_n(b | h) = (count(h b) + types(h) p_{n-1}(b | h')) / (count(h) + types(h)),   p_0 = 1/256

with h the last n-1 bytes, h' the last n-2, and types(h) the number of different bytes seen after h (Chen and Goodman
1999, section 2.4). The end of a document is not modelled; before its beginning stand zero bytes.

Shape suffixes: N bytes of a text, K different n-grams.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FILE = "ngram.npz"
HIGHEST_ORDER = 8
"""Bytes of an n-gram, its context and itself: it is one 64-bit number."""


@dataclass(frozen=True)
class Grams:
    """All n-grams of one length.

    Args:
        keys_K: n bytes as a number, in order.
        counts_K: how often each was seen.
    """

    keys_K: np.ndarray
    counts_K: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Where in `keys_K` each context begins."""
        contexts_K = self.keys_K >> np.uint64(8)
        return np.flatnonzero(np.concatenate([[True], contexts_K[1:] != contexts_K[:-1]]))

    @cached_property
    def contexts(self) -> np.ndarray:
        return self.keys_K[self.starts] >> np.uint64(8)

    @cached_property
    def totals(self) -> np.ndarray:
        """How often each context was seen."""
        return np.add.reduceat(self.counts_K, self.starts)

    @cached_property
    def types(self) -> np.ndarray:
        """How many different bytes followed each context."""
        return np.diff(np.append(self.starts, len(self.keys_K)))

    def refine(self, keys_N: np.ndarray, p_N: np.ndarray) -> np.ndarray:
        """Probabilities by contexts that are one byte longer; where the context was never seen, those given."""
        at_N, seen_N = places(self.contexts, keys_N >> np.uint64(8))
        gram_N, there_N = places(self.keys_K, keys_N)
        count_N = np.where(there_N, self.counts_K[gram_N], 0)
        types_N = self.types[at_N]
        return np.where(seen_N, (count_N + types_N * p_N) / (self.totals[at_N] + types_N), p_N)


@dataclass(frozen=True)
class NGram:
    """The model.

    Args:
        grams: n-grams of length 1, 2, ...
    """

    grams: list[Grams]

    def bits_per_byte(self, text: str) -> float:
        """Mean information of the text's bytes; 0 for an empty text."""
        padded = bytes(len(self.grams) - 1) + text.encode("utf-8", errors="replace")
        p_N = np.full(len(padded) - len(self.grams) + 1, 1 / 256)
        if not len(p_N):
            return 0.0
        for n, grams in enumerate(self.grams, 1):
            p_N = grams.refine(keys(padded, n)[-len(p_N) :], p_N)
        return float(-np.log2(p_N).mean())

    def save(self, file: Path) -> None:
        arrays = {f"keys_{n}": grams.keys_K for n, grams in enumerate(self.grams, 1)}
        arrays |= {f"counts_{n}": grams.counts_K for n, grams in enumerate(self.grams, 1)}
        np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, file: Path) -> "NGram":
        with np.load(file) as arrays:
            order = len(arrays.files) // 2
            return cls([Grams(arrays[f"keys_{n}"], arrays[f"counts_{n}"]) for n in range(1, order + 1)])


def train(texts: Iterable[str], order: int) -> NGram:
    """Count the n-grams of some texts.

    Args:
        texts: reference documents.
        order: bytes of the longest n-gram, in [1, 8].
    """
    before = bytes(order - 1)
    data = b"".join(before + text.encode("utf-8", errors="replace") for text in texts)
    return NGram([counted(data, n, before) for n in range(1, order + 1)])


def counted(data: bytes, n: int, before: bytes) -> Grams:
    """The n-grams that end in a byte of a document; zero bytes stand between documents only."""
    keys_N = keys(data, n)
    keys_N = keys_N[(keys_N & np.uint64(0xFF)) != 0] if before else keys_N
    return Grams(*np.unique(keys_N, return_counts=True))


def keys(data: bytes, n: int) -> np.ndarray:
    """Every n bytes in a row, as a number."""
    bytes_N = np.frombuffer(data, dtype=np.uint8)
    found = np.zeros(max(len(data) - n + 1, 0), dtype=np.uint64)
    for place in range(n):
        found = (found << np.uint64(8)) | bytes_N[place : place + len(found)]
    return found


def places(sorted_K: np.ndarray, wanted_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where values stand in a sorted array, and whether they do."""
    at_N = np.minimum(np.searchsorted(sorted_K, wanted_N), len(sorted_K) - 1)
    return at_N, sorted_K[at_N] == wanted_N
