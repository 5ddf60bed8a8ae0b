"""Which evaluation items a text holds, by runs of n words that it shares with them (Brown et al. 2020,
arXiv:2005.14165, appendix C).

Runs are compared by 64-bit hashes, which one sorted array holds for all items: 12 bytes a run, mapped into memory once
for all processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.evaluation_sets import Item
from data_pipeline.shingles import CHUNKS, LONGEST, simplified_words

BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the polynomial that a run's hash is: odd, so that runs that differ in one word never have the same."""
SCREEN = 2**24
"""Most bits of a hash's beginning that are looked at before the hash itself is searched."""


class Hashes(dict[str, tuple[int, ...]]):
    """Chunk between white space -> 64-bit hashes of its simplified words.

    Args:
        numbers: whether every number becomes 0.
    """

    def __init__(self, numbers: bool):
        super().__init__()
        self.words = simplified_words(numbers)

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        from xxhash import xxh64_intdigest

        hashes = tuple(map(xxh64_intdigest, self.words[chunk]))
        if len(self) >= CHUNKS:
            self.clear()
        if len(chunk) <= LONGEST:
            self[chunk] = hashes
        return hashes

    def of(self, chunks: Iterable[str]) -> np.ndarray:
        """Hashes of the words of all chunks, in order."""
        return np.fromiter((value for chunk in chunks for value in self[chunk]), dtype=np.uint64)


def hashes_of_runs(words: np.ndarray, lengths: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """For each length in ascending order, the hash of every run of so many words, by where it starts.

    Args:
        words: hashes of words.
        lengths: in ascending order.
    """
    runs, done = np.zeros_like(words), 0
    for length in lengths:
        if length > len(words):
            return
        while done < length:
            runs = runs[: len(words) - done] * BASE + words[done:]
            done += 1
        yield length, runs + np.uint64(length)


@dataclass(frozen=True)
class Match:
    """How items are looked for; `queries` and `crossing` are datatrove's `find_query_ngrams` and `find_overlap_ngrams`.

    Args:
        n: words in a run.
        shortest: words that an item of fewer than n must have to be looked for, as a whole.
        queries: look for runs within queries too, beside those in labels.
        crossing: look for runs that begin in a query and end in its label.
        numbers: let every number be 0, so that no number tells two texts apart.
        share: least share of an item's runs that a text must have to hold the item; 0 for any one run.
    """

    n: int
    shortest: int
    queries: bool
    crossing: bool
    numbers: bool
    share: float

    def runs(self, query: np.ndarray, label: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Lengths and hashes of the runs that are looked for, of the words of one query and one label."""
        whole, border = np.concatenate([query, label]), len(query)
        parts = [whole] if (self.crossing if border and len(label) else self.queries or len(label)) else []
        parts += [query] if self.queries and border and len(label) else []
        for part in parts:
            if self.shortest <= len(part) < self.n:
                yield from hashes_of_runs(part, [len(part)])
        for length, hashes in hashes_of_runs(whole, [self.n]):
            start = np.arange(len(hashes))
            in_label, in_query = start >= border, start + length <= border
            yield length, hashes[in_label | (in_query & self.queries) | (~in_label & ~in_query & self.crossing)]


class Index:
    """Runs of evaluation items, searchable.

    Args:
        match: how items are looked for.
        hashes: of the runs, ascending.
        items: whose each is.
        runs: of each item, how many different ones there are.
        lengths: of runs, in words, ascending.
    """

    def __init__(self, match: Match, hashes: np.ndarray, items: np.ndarray, runs: np.ndarray, lengths: np.ndarray):
        self.match = match
        self.hashes = hashes
        self.items = items
        self.runs = runs
        self.lengths = lengths

    @classmethod
    def of(cls, items: Iterable[Item], match: Match) -> "Index":
        """The index of items, numbered from 0."""
        hashes, lengths = Hashes(match.numbers), set()
        found, owners, runs = [], [], []
        for number, item in enumerate(items):
            query = hashes.of(item.query.split())
            own = []
            for label in item.labels or ("",):
                for length, some in match.runs(query, hashes.of(label.split())):
                    own.append(some)
                    lengths |= {length} if len(some) else set()
            different = np.unique(np.concatenate(own)) if own else np.empty(0, dtype=np.uint64)
            found.append(different)
            owners.append(np.full(len(different), number, dtype=np.uint32))
            runs.append(len(different))
        every, owner = (np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64) for parts in (found, owners))
        order = np.lexsort((owner, every))
        return cls(match, every[order], owner[order], np.array(runs, dtype=np.uint32), np.array(sorted(lengths)))

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("hashes", "items", "runs", "lengths"):
            np.save(directory / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, directory: Path, match: Match) -> "Index":
        """What `save` wrote, mapped into memory."""
        names = ("hashes", "items", "runs", "lengths")
        return cls(match, *(np.load(directory / f"{name}.npy", mmap_mode="r") for name in names))

    @cached_property
    def words(self) -> Hashes:
        return Hashes(self.match.numbers)

    @cached_property
    def screen(self) -> np.ndarray:
        """Whether any hash begins with these bits: most runs of a text are looked up here and nowhere else."""
        bits = min(SCREEN, 2 ** (8 * max(len(self.hashes), 1)).bit_length())
        screen = np.zeros(bits, dtype=bool)
        screen[self._beginnings(self.hashes, bits)] = True
        return screen

    @staticmethod
    def _beginnings(hashes: np.ndarray, bits: int) -> np.ndarray:
        return (hashes >> np.uint64(64 - (bits.bit_length() - 1))).astype(np.int64)

    def find(self, chunks: Sequence[str]) -> "Findings":
        """Which items a text holds.

        Args:
            chunks: the text's, between white space.
        """
        words = self.words.of(chunks)
        rows, starts, ends = [], [], []
        for length, runs in hashes_of_runs(words, self.lengths.tolist()):
            start = np.flatnonzero(self.screen[self._beginnings(runs, len(self.screen))])
            left = np.searchsorted(self.hashes, runs[start])
            right = np.searchsorted(self.hashes, runs[start], side="right")
            count = right - left
            rows.append(np.repeat(left - np.cumsum(count) + count, count) + np.arange(count.sum()))
            starts.append(np.repeat(start, count))
            ends.append(starts[-1] + length)
        if not sum(map(len, rows)):
            return NOTHING
        row, start, end = (np.concatenate(parts) for parts in (rows, starts, ends))
        different = np.unique(row)  # a row is one run of one item
        items, counts = np.unique(self.items[different], return_counts=True)
        held = items[counts >= self.match.share * self.runs[items]]
        wanted = np.isin(self.items[row], held)
        spans = np.unique(np.stack([start[wanted], end[wanted]], axis=1), axis=0)
        return Findings(held.tolist(), [(int(first), int(last)) for first, last in spans])

    def chunk_of_words(self, chunks: Sequence[str]) -> np.ndarray:
        """Of each word, the number of the chunk that it is in."""
        return np.repeat(np.arange(len(chunks)), [len(self.words[chunk]) for chunk in chunks])


@dataclass(frozen=True)
class Findings:
    """What of the evaluation items is in a text.

    Args:
        items: numbers of those it holds, ascending.
        spans: first word of each run that it shares with them, and the one after its last.
    """

    items: list[int]
    spans: list[tuple[int, int]]


NOTHING = Findings([], [])
