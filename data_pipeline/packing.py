"""Packing: many short sequences share windows of one length.

Best-fit decreasing: longest first, each into the fullest window that still has room. At most 11/9 of the optimal number
of windows plus one (Johnson 1973); used for language models by Ding et al. 2024 (arXiv:2404.10830).

Shape suffixes: B windows, L tokens, N tokens of all sequences.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.batch import IGNORED, MicroBatch, Span


def best_fit_decreasing(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Share sequences out over windows; none is cut.

    Args:
        lengths: of the sequences, in tokens; each 1 <= length <= capacity.
        capacity: of a window, in tokens.
        seed: orders sequences of equal length, so that neighbours in the input need not share a window.

    Returns:
        For each window the indices of its sequences: a pure function of the arguments.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    longest_first = shuffled[np.argsort(-np.asarray(lengths)[shuffled], kind="stable")]
    windows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> windows that have exactly this much left
    rooms: list[int] = []  # the keys of `with_room`, ascending
    for index in longest_first.tolist():
        fit = bisect_left(rooms, lengths[index])
        if fit == len(rooms):
            window, room = len(windows), capacity
            windows.append([])
        else:
            room = rooms[fit]
            window = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[fit]
        windows[window].append(index)
        left = room - lengths[index]
        if left not in with_room:
            insort(rooms, left)
        with_room.setdefault(left, []).append(window)
    return windows


class Packed:
    """Windows that each hold several sequences, as documents that never attend to each other. A pure function of the
    sequences and the seed.

    Args:
        sequences: input tokens of each, and the label of every one of them; at least one sequence.
        sequence_length: tokens per window; no sequence is longer.
        seed: of the packing.
        pad: id that fills a window up.
        fingerprint: names this set of samples.
        source: file of the records that the sequences were made of.
        records: number of each sequence's record there, from 0.
    """

    def __init__(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        sequence_length: int,
        seed: int,
        pad: int,
        fingerprint: str,
        source: str = "",
        records: Sequence[int] = (),
    ):
        self.sequence_length = sequence_length
        self.pad = pad
        self.fingerprint = fingerprint
        self._source, self._records = source, records
        lengths = [len(labels) for _, labels in sequences]
        self._windows = best_fit_decreasing(lengths, sequence_length, seed)
        self._ends = np.cumsum(lengths)
        self._tokens_N = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens, _ in sequences])
        self._labels_N = np.concatenate([np.asarray(labels, dtype=np.int64) for _, labels in sequences])

    def __len__(self) -> int:
        return len(self._windows)

    def spans(self, index: int) -> list[Span]:
        """The records of a window, in order; they are read from their beginning."""
        members = self._windows[index] if self._source else []
        lengths = [int(self._ends[member] - (self._ends[member - 1] if member else 0)) for member in members]
        return [
            Span(self._source, self._records[member], 0, length)
            for member, length in zip(members, lengths, strict=True)
        ]

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        shape = (len(indices), self.sequence_length)
        tokens_BL, labels_BL = np.full(shape, self.pad), np.full(shape, IGNORED)
        positions_BL, documents_BL = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
        for row, index in enumerate(indices):
            begin = 0
            for document, member in enumerate(self._windows[index]):
                source = slice(self._ends[member - 1] if member else 0, self._ends[member])
                length = source.stop - source.start
                place = slice(begin, begin + length)
                tokens_BL[row, place] = self._tokens_N[source]
                labels_BL[row, place] = self._labels_N[source]
                positions_BL[row, place] = np.arange(length)
                documents_BL[row, place] = document
                begin += length
        return MicroBatch(
            tokens_BL=torch.from_numpy(tokens_BL),
            labels_BL=torch.from_numpy(labels_BL),
            positions_BL=torch.from_numpy(positions_BL),
            documents_BL=torch.from_numpy(documents_BL),
            samples_B=torch.tensor(indices, dtype=torch.int64),
        )
