"""Whole matrices from sharded ones: each is worked on by one rank, which nobody else repeats.

With n ranks, n matrices make a round: every rank sends its rows of matrix j to rank j, works on the one matrix it now
holds whole, and sends the rows of the result back. Two all-to-alls move each element twice; nothing is computed twice.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from parallel.mesh import SHARD
from parallel.reduce import local_of


def map_whole(function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """`function` of each whole matrix; this rank's rows of each result. All ranks of the mesh call it together.

    Args:
        function: maps a matrix to one of the same shape and dtype.
        matrices: plain tensors, or DTensors sharded by rows over the mesh axis dp_shard.
    """
    first = matrices[0]
    ranks = first.device_mesh[SHARD].size() if isinstance(first, DTensor) else 1
    if ranks == 1:
        return [function(local_of(matrix)) for matrix in matrices]
    group = first.device_mesh[SHARD].get_group()  # type: ignore[attr-defined]
    # Neighbours in size share a round, so that no rank waits long for another.
    order = sorted(range(len(matrices)), key=lambda i: (-matrices[i].numel(), i))
    results: dict[int, Tensor] = {}
    for start in range(0, len(order), ranks):
        numbers = order[start : start + ranks]
        parts = _round(function, [matrices[i] for i in numbers], group)
        results.update(zip(numbers, parts, strict=True))
    return [results[i] for i in range(len(matrices))]


def rows_of(rows: int, ranks: int) -> list[int]:
    """How many rows of a matrix each rank holds: all the same, but for the last ones (torch.chunk's rule)."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(ranks)]


def _round(function: Callable[[Tensor], Tensor], matrices: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    ranks, rank = group.size(), group.rank()
    locals_ = [local_of(matrix) for matrix in matrices]
    sent = [local.numel() for local in locals_] + [0] * (ranks - len(locals_))
    if rank < len(matrices):
        whole = matrices[rank]
        assert isinstance(whole, DTensor) and whole.placements[-1] == Shard(0), "only rows are sharded"
        rows, columns = whole.shape
        received = [count * columns for count in rows_of(rows, ranks)]
    else:
        rows, columns, received = 0, 0, [0] * ranks
    outgoing = torch.cat([local.reshape(-1) for local in locals_])
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    if rank < len(matrices):
        incoming = function(incoming.view(rows, columns)).reshape(-1).contiguous()
    dist.all_to_all_single(outgoing, incoming, sent, received, group=group)
    return [part.view_as(local) for part, local in zip(outgoing.split(sent), locals_, strict=False)]
