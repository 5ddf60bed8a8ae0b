"""Packing: many short sequences share windows of one length.

Best-fit decreasing: longest first, each into the fullest window that still has room. At most 11/9 of the optimal number
of windows plus one (Johnson 1973); used for language models by Ding et al. 2024 (arXiv:2404.10830).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


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
