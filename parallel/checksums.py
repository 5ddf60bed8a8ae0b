"""Fingerprints of tensors, bit by bit and on the device; and whether all ranks that hold a piece hold the same one.

A tensor's bits, as 64-bit words, fill a square of lines. The sums of its rows and of its columns (modulo 2^64, so in
any order and exact) are each scrambled together with their place, and added. A change that leaves every row's and
every column's sum as it was takes four words at least, at the corners of a rectangle, of which opposite bits flip in
opposite ways: whatever one flip, two, or three do, or two elements that change places, some line tells, and the
fingerprint with it, but for one chance in 2^64. Memory is read twice and nothing of its size is written.

Shape suffixes: T tensors, S sums of all their lines, K kinds of pieces, R ranks.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from parallel.reduce import local_of

Place = tuple[tuple[int, int], ...]
"""Axes of a mesh that a tensor is shared out over, and this rank's coordinates there: which piece it has."""

SMALL = 256
"""Words up to which a tensor is looked at word by word."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size of an element, in bytes."""


class Checksums:
    """Takes fingerprints of tensors which are the same in number and size every time.

    Args:
        device: where fingerprints are put together; the tensors may be elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._shape: tuple[int, ...] = ()
        self._owner_S = self._place_S = torch.zeros(0, dtype=torch.int64, device=device)

    @torch.no_grad()
    def of(self, tensors: Iterable[Tensor]) -> Tensor:
        """sums_T: one of this rank's part of each; nobody waits for the device."""
        lines = [_lines(tensor) for tensor in tensors]
        if not lines:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        self._arrange(tuple(map(len, lines)))
        lines_S = torch.cat([sums.to(self.device, non_blocking=True) for sums in lines])
        sums_T = torch.zeros(len(lines), dtype=torch.int64, device=self.device)
        return sums_T.index_add_(0, self._owner_S, scrambled(lines_S, self._place_S))

    def _arrange(self, shape: tuple[int, ...]) -> None:
        if shape != self._shape:
            places = [torch.arange(count) for count in shape]
            owners = [torch.full((count,), number) for number, count in enumerate(shape)]
            self._place_S, self._owner_S = torch.cat(places).to(self.device), torch.cat(owners).to(self.device)
            self._shape = shape


def scrambled(words: Tensor, places: Tensor) -> Tensor:
    """Words that show neither what they were nor where: the generator SplitMix64 (Steele, Lea & Flood 2014)."""
    words = words + (places + 1) * -0x61C8864680B583EB
    words = (words ^ _shifted(words, 30)) * -0x40A7B892E31B1A47
    words = (words ^ _shifted(words, 27)) * -0x6B2FB644ECCEEE15
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (words >> bits) & ((1 << 64 - bits) - 1)


def _lines(tensor: Tensor) -> Tensor:
    """The sums of the rows and of the columns of this rank's part; the words themselves where they are few."""
    elements = local_of(tensor).detach().reshape(-1).contiguous()
    per_word = 8 // elements.element_size()
    if elements.storage_offset() % per_word:
        elements = elements.clone()  # words lie at multiples of their size
    filled = elements.numel() // per_word * per_word
    words, rest = elements[:filled].view(torch.int64), elements[filled:].view(INTEGERS[elements.element_size()]).long()
    if len(words) <= SMALL:
        return torch.cat([words, rest])
    columns = 1 << (len(words).bit_length() + 1) // 2
    rows = len(words) // columns
    square = words[: rows * columns].view(rows, columns)
    return torch.cat([square.sum(1), square.sum(0), words[rows * columns :], rest])


class Replicas:
    """Which ranks hold the same: pieces by name and by place on the axes that share them out. What a checkpoint would
    hold once must be the same, bit for bit, wherever it is held. All ranks make it together.

    Of the names at a place ranks tell each other a digest. Only where ranks at one place have other names, as stages of
    a pipeline do, they tell the names, once for all that have the same ones.

    Args:
        state: this rank's tensors, by name, as `Engine.state` has them.
        device: where sums are.

    Attributes:
        kinds: the sets of ranks, this one among them, that hold some pieces together; in the order of `sums_K`.
    """

    def __init__(self, state: Mapping[str, Tensor], device: torch.device):
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.names = list(state)
        numbers = {name: number for number, name in enumerate(self.names)}
        mine: dict[Place, list[str]] = {}
        for name in sorted(state):
            mine.setdefault(_place(state[name]), []).append(name)
        ranks_at, names_of = _exchanged(mine)
        together = functools.cache(partial(_together, names_of))
        members: dict[tuple[int, ...], list[str]] = {}
        for ranks_of in ranks_at.values():
            for digests, names in together(tuple(sorted(ranks_of))).items():
                ranks = tuple(sorted(rank for digest in digests for rank in ranks_of[digest]))
                if len(ranks) > 1:
                    members.setdefault(ranks, []).extend(names if self.rank in ranks else ())
        self._all = sorted(members)
        """Every rank's kinds."""
        self._kinds_of: list[list[int]] = [[] for _ in range(self.size)]
        for number, ranks in enumerate(self._all):
            for rank in ranks:
                self._kinds_of[rank].append(number)
        self.kinds = [self._all[number] for number in self._kinds_of[self.rank]]
        self.width = max(map(len, self._kinds_of))
        """K: the most that a rank has."""
        self._members = [
            torch.tensor([numbers[name] for name in sorted(members[kind])], device=device) for kind in self.kinds
        ]

    @torch.no_grad()
    def of(self, sums_T: Tensor) -> Tensor:
        """sums_K: of the pieces of each kind together; the kinds that other ranks have more of are 0."""
        sums_K = torch.zeros(self.width, dtype=torch.int64, device=self.device)
        for number, members in enumerate(self._members):
            places = torch.arange(len(members), device=self.device)
            sums_K[number] = scrambled(sums_T[members], places).sum()
        return sums_K

    def differing(self, sums_RK: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The sets of ranks that do not all have the same; every rank gets the same answer."""
        found: dict[int, set[int]] = {}
        for kinds, sums_K in zip(self._kinds_of, sums_RK, strict=True):
            for kind, value in zip(kinds, sums_K, strict=False):
                found.setdefault(kind, set()).add(value)
        return [self._all[kind] for kind in sorted(found) if len(found[kind]) > 1]

    def shared_names(self, kind: tuple[int, ...]) -> dict[str, int]:
        """Names of this rank's pieces of a kind -> their number among all tensors; none where it has none of it."""
        if kind not in self.kinds:
            return {}
        return {self.names[number]: number for number in self._members[self.kinds.index(kind)].tolist()}


def _exchanged(mine: Mapping[Place, list[str]]) -> tuple[dict[Place, dict[str, list[int]]], dict[str, list[str]]]:
    """Where who has which names: the ranks at each place by the digest of their names there; and the names by their
    digest, those of this rank and those that are not the only ones at a place."""
    names_of = {_digest(names): names for names in mine.values()}
    told: list[dict[Place, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(told, {place: _digest(names) for place, names in mine.items()})
    ranks_at: dict[Place, dict[str, list[int]]] = {}
    for rank, theirs in enumerate(told):
        for place, digest in theirs.items():
            ranks_at.setdefault(place, {}).setdefault(digest, []).append(rank)
    first_of: dict[str, int] = {}
    for ranks_of in ranks_at.values():
        for digest, ranks in ranks_of.items() if len(ranks_of) > 1 else ():
            first_of[digest] = min(ranks[0], first_of.get(digest, ranks[0]))
    for digest in sorted(first_of):
        told_names = [names_of.get(digest, [])]
        dist.broadcast_object_list(told_names, src=first_of[digest])
        [names_of[digest]] = told_names
    return ranks_at, names_of


def _together(names_of: Mapping[str, list[str]], digests: tuple[str, ...]) -> dict[tuple[str, ...], list[str]]:
    """Names that ranks at one place have, by who has them: some of the digests. Of a single digest that is none of this
    rank's, the names are not known."""
    if len(digests) == 1:
        return {digests: names_of.get(digests[0], [])}
    holders: dict[str, list[str]] = {}
    for digest in digests:
        for name in names_of[digest]:
            holders.setdefault(name, []).append(digest)
    found: dict[tuple[str, ...], list[str]] = {}
    for name, theirs in holders.items():
        found.setdefault(tuple(theirs), []).append(name)
    return found


def _digest(names: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()


def _place(tensor: Tensor) -> Place:
    """Of this rank's piece."""
    if not isinstance(tensor, DTensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return tuple(
        (axis, coordinate[axis])
        for axis, placement in enumerate(tensor.placements)
        if not isinstance(placement, Replicate) and tensor.device_mesh.size(axis) > 1
    )


def outvoted(sums: Mapping[int, int]) -> list[int]:
    """Of the ranks that hold one piece, those that most do not agree with; all of them where no answer has the most."""
    votes: dict[int, list[int]] = {}
    for rank, value in sums.items():
        votes.setdefault(value, []).append(rank)
    counts = sorted(map(len, votes.values()))
    if len(counts) < 2:
        return []
    if counts[-1] == counts[-2]:
        return sorted(sums)
    return sorted(rank for ranks in votes.values() if len(ranks) < counts[-1] for rank in ranks)
