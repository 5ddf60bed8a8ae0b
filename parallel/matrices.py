"""Whole matrices from sharded ones: each is worked on by one rank, which none of those that share it repeats.

With n ranks, n matrices make a round: every rank sends its block of matrix j to rank j, works on the one matrix it now
holds whole, and sends the blocks of the result back. Where several mesh axes shard a matrix, it is put together along
one after the other, the last that split it first, so that only groups are needed that the mesh has: two all-to-alls per
axis, of what a rank holds each; nothing is computed twice.

Shape suffixes: M rows, N columns, of this rank's block or of the whole.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from conf.errors import LongrunError
from parallel.reduce import local_of


class MatrixError(LongrunError):
    """A matrix is not laid out so that its blocks could be put together."""


@dataclass(frozen=True)
class Split:
    """How one mesh axis splits a matrix, or what others left of it.

    Args:
        group: the ranks of the axis.
        dim: -2 splits rows, -1 columns.
        sizes: how many of them each rank has.
    """

    group: dist.ProcessGroup
    dim: int
    sizes: list[int]


@dataclass(frozen=True)
class _Block:
    """A matrix, or what this rank holds of it.

    Args:
        local_MN: the elements.
        splits: what cut it out of the whole, in this order.
    """

    local_MN: Tensor
    splits: list[Split]

    def shape_on(self, rank: int) -> tuple[int, int]:
        """Of the block that another rank of the last split holds."""
        split = self.splits[-1]
        shape = list(self.local_MN.shape)
        shape[split.dim] = split.sizes[rank]
        return shape[0], shape[1]


def map_whole(function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """`function` of each whole matrix; this rank's part of each result. All ranks of the mesh call it together.

    Args:
        function: maps a matrix, or a stack of them, to one of the same shape and dtype.
        matrices: plain tensors or DTensors with any placements: of two dimensions, or of three: a stack, of which each
            rank may have some matrices or a block of each.

    Raises:
        MatrixError: a matrix is a sum that was not reduced.
    """
    results: dict[int, Tensor] = {}
    shared: dict[tuple[str, ...], list[tuple[int, _Block]]] = {}
    for number, matrix in enumerate(matrices):
        local, splits = local_of(matrix), splits_of(matrix)
        count = math.prod(local.shape[:-2])
        if count == 0 or not splits:
            results[number] = function(local) if local.numel() else local
            continue
        groups = tuple(split.group.group_name for split in splits)
        shared.setdefault(groups, []).extend(
            (number, _Block(local_MN, splits)) for local_MN in local.reshape(count, *local.shape[-2:])
        )
    found: dict[int, list[Tensor]] = {}
    for numbered in shared.values():
        ranks = math.prod(len(split.sizes) for split in numbered[0][1].splits)
        # Neighbours in size share a round, so that no rank waits long for another.
        numbered.sort(key=lambda item: (-matrices[item[0]].shape[-2:].numel(), item[0]))
        for start in range(0, len(numbered), ranks):
            numbers, blocks = zip(*numbered[start : start + ranks], strict=True)
            for number, result in zip(numbers, _together(function, list(blocks)), strict=True):
                found.setdefault(number, []).append(result)
    results |= {number: torch.stack(parts).view_as(local_of(matrices[number])) for number, parts in found.items()}
    return [results[number] for number in range(len(matrices))]


def splits_of(matrix: Tensor) -> list[Split]:
    """The mesh axes that split the last two dimensions of a tensor, in the order in which they do.

    Raises:
        MatrixError: see `map_whole`.
    """
    if not isinstance(matrix, DTensor):
        return []
    mesh, extents = matrix.device_mesh, list(matrix.shape)
    axes = [
        (axis, placement)
        for axis, placement in enumerate(matrix.placements)
        if mesh.size(axis) > 1 and not placement.is_replicate()
    ]
    if any(placement.is_partial() for _, placement in axes):
        raise MatrixError(f"a matrix with placements {matrix.placements} is a sum that was not reduced.")
    # An axis that splits what a later one has split already (FSDP over tensor parallelism) is a Shard of its own type.
    axes.sort(key=lambda item: type(item[1]) is not Shard)
    splits = []
    for axis, placement in axes:
        dim = placement.dim % matrix.ndim - matrix.ndim  # type: ignore[attr-defined]
        if dim >= -2:
            sizes = chunk_sizes(extents[dim], mesh.size(axis))
            splits.append(Split(mesh.get_group(axis), dim, sizes))
            extents[dim] = sizes[mesh.get_local_rank(axis)]
    return splits


def chunk_sizes(length: int, ranks: int) -> list[int]:
    """How many rows or columns each rank holds: all the same, but for the last ones (torch.chunk's rule)."""
    chunk = -(-length // ranks)
    return [max(0, min(chunk, length - rank * chunk)) for rank in range(ranks)]


def _together(function: Callable[[Tensor], Tensor], blocks: list[_Block]) -> list[Tensor]:
    """`function` of the matrices that these are blocks of, all split over the same groups; the i-th is put together on
    rank i modulo n of the last of them."""
    if not blocks or not blocks[0].splits:
        return [function(block.local_MN) for block in blocks]
    group = blocks[0].splits[-1].group
    ranks = group.size()
    dealt = [blocks[rank::ranks] for rank in range(ranks)]
    mine = dealt[group.rank()]
    shapes = [[block.shape_on(rank) for block in mine] for rank in range(ranks)]
    sent = [sum(block.local_MN.numel() for block in theirs) for theirs in dealt]
    received = [sum(map(math.prod, theirs)) for theirs in shapes]
    outgoing = torch.cat([block.local_MN.reshape(-1) for theirs in dealt for block in theirs])
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    pieces = _cut(incoming, [shape for theirs in shapes for shape in theirs])
    joined = [
        replace(block, local_MN=torch.cat(pieces[i :: len(mine)], block.splits[-1].dim), splits=block.splits[:-1])
        for i, block in enumerate(mine)
    ]
    results = [
        result.split(block.splits[-1].sizes, block.splits[-1].dim)
        for block, result in zip(mine, _together(function, joined), strict=True)
    ]
    incoming = torch.cat([outgoing[:0], *(parts[rank].reshape(-1) for rank in range(ranks) for parts in results)])
    dist.all_to_all_single(outgoing, incoming, sent, received, group=group)
    parts = iter(_cut(outgoing, [(*block.local_MN.shape,) for theirs in dealt for block in theirs]))
    answers = [[next(parts) for _ in theirs] for theirs in dealt]
    return [answers[i % ranks][i // ranks] for i in range(len(blocks))]


def _cut(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes, which lie one after the other."""
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]
