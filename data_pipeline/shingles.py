"""How texts are compared: by their simplified words, and by runs of n of them (shingles).

Simplifying and splitting are datatrove's `simplify_text` and spaCy's tokenizer, to the word. Both treat what lies
between white space by itself, so each different chunk of a corpus is simplified and split once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import numpy as np

from data_pipeline.words import split_words

CHUNKS, LONGEST = 2**20, 64
"""Different chunks that are remembered, then all are forgotten; characters of the longest that is remembered."""
PRIME = np.uint64(2**61 - 1)
BLOCK = 256
"""Shingles permuted at a time, so that all permutations of them stay in the processor's cache."""


class Words(dict[str, tuple[bytes, ...]]):
    """Chunk between white space -> its simplified words, in UTF-8.

    Args:
        numbers: whether every number becomes 0, so that texts that differ in nothing but numbers are equal.
    """

    def __init__(self, numbers: bool = True):
        super().__init__()
        self.numbers = numbers

    @cached_property
    def _split(self) -> Callable[[str], list[str]]:
        from datatrove.utils.text import TextNormConfig, simplify_text

        ascii_only = TextNormConfig(norm_numbers=self.numbers, norm_unicode_diacritics=False)
        others = TextNormConfig(norm_numbers=self.numbers)
        return lambda chunk: split_words(simplify_text(chunk, ascii_only if chunk.isascii() else others))

    def __missing__(self, chunk: str) -> tuple[bytes, ...]:
        words = tuple(word.encode("utf-8", "surrogatepass") for word in self._split(chunk))
        if len(self) >= CHUNKS:
            self.clear()
        if len(chunk) <= LONGEST:
            self[chunk] = words
        return words

    def of(self, text: str) -> list[bytes]:
        """The simplified words of a text."""
        return [word for words in map(self.__getitem__, text.split()) for word in words]


@cache
def simplified_words(numbers: bool = True) -> Words:
    """The words of this process, with all that they remember."""
    return Words(numbers)


def joined(words: Sequence[bytes], n: int) -> list[bytes]:
    """Every run of n words, joined by blanks."""
    text, starts = b" ".join(words), [0, *accumulate(len(word) + 1 for word in words)]
    return [text[start : end - 1] for start, end in zip(starts, starts[n:], strict=False)]


@dataclass(frozen=True)
class MinHash:
    """Signatures of which two texts share as large a part as they share of their shingles (Broder 1997), cut into
    bands: texts are near-duplicates if all hashes of one band are equal, which texts of similarity s are with
    probability 1 - (1 - s^rows)^bands (Leskovec et al., Mining of Massive Datasets, section 3.4).

    The hashes are datatrove's: xxhash64 of a shingle, permuted by a * hash + b modulo 2^61 - 1.

    Args:
        n: words in a shingle.
        bands: bands of a signature.
        rows: hashes in a band.
        seed: of a and b.
    """

    n: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1

    @cached_property
    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        """a and b of each permutation, as columns."""
        draw = np.random.RandomState(self.seed)
        size = self.bands * self.rows
        a = draw.randint(1, PRIME, dtype=np.uint64, size=size)
        return a[:, None], draw.randint(0, PRIME, dtype=np.uint64, size=size)[:, None]

    def signature(self, words: Sequence[bytes]) -> np.ndarray | None:
        """The hashes of each band, bands x rows; None of a text with fewer than n words.

        Args:
            words: simplified words, from `Words.of`.
        """
        from xxhash import xxh64_intdigest

        if len(words) < self.n:
            return None
        hashes = np.fromiter(map(xxh64_intdigest, joined(words, self.n)), dtype=np.uint64)
        a, b = self.parameters
        lowest = np.full(len(a), np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(hashes), BLOCK):
            permuted = hashes[None, start : start + BLOCK] * a
            permuted += b
            # x mod 2^61 - 1 of a 64-bit x, without a division: fold the three highest bits, then subtract if too large
            folded = permuted >> np.uint64(61)
            permuted &= PRIME
            permuted += folded
            np.subtract(permuted, PRIME, out=folded)
            np.minimum(permuted, folded, out=permuted)
            np.minimum(lowest, permuted.min(axis=1), out=lowest)
        return lowest.reshape(self.bands, self.rows)

    def digests(self, words: Sequence[bytes]) -> list[bytes]:
        """128 bits of each band: equal digests, equal bands. Empty for a text with fewer than n words."""
        from xxhash import xxh3_128_digest

        signature = self.signature(words)
        return [] if signature is None else [xxh3_128_digest(band.tobytes()) for band in signature]
