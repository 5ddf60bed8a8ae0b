"""Whole tensors from the blocks that ranks hold, a few rows at a time, on the CPU of one rank.

A block travels once, from one of the ranks that have it to the one that asks; nobody else keeps anything. Blocks go
through host memory, so that a device never holds more than its own part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from conf.errors import LongrunError
from parallel.reduce import local_of


class GatherError(LongrunError):
    """The ranks together do not hold a tensor, or not as one."""


@dataclass(frozen=True)
class Block:
    """A rank's part of a tensor.

    Args:
        start: index of its first element in the whole.
        shape: its own.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]


def block_of(tensor: Tensor) -> Block | None:
    """This rank's part of a tensor; None where it is no block: FSDP after tensor parallelism on one dimension takes
    rows here and there."""
    if not isinstance(tensor, DTensor):
        return Block((0,) * tensor.ndim, tuple(tensor.shape))
    if any(type(placement).__name__ == "_StridedShard" for placement in tensor.placements):
        return None
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Block(tuple(start), tuple(shape))


class Gathered:
    """The tensors of all ranks; each whole where and when it is asked for. All ranks make it, and ask, together.

    Args:
        tensors: this rank's, by name, plain or sharded. Ranks may have different names, as pipeline stages have.

    Attributes:
        meta: every name of any rank -> a tensor of the whole's shape and dtype on the meta device.

    Raises:
        GatherError: the blocks of a tensor do not make it up, or ranks have tensors of other shapes under one name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._tensors = {name: _as_block(tensor) for name, tensor in tensors.items()}
        mine = {name: (tuple(t.shape), t.dtype, block_of(t)) for name, t in self._tensors.items()}
        told = [mine]
        if dist.is_initialized():
            told = [mine] * dist.get_world_size()
            dist.all_gather_object(told, mine)
        self.meta: dict[str, Tensor] = {}
        self._holders: dict[str, dict[Block, int]] = {}  # each block, and the first rank that has it
        for rank, theirs in enumerate(told):
            for name, (shape, dtype, block) in theirs.items():
                known = self.meta.setdefault(name, torch.empty(shape, dtype=dtype, device="meta"))
                if (tuple(known.shape), known.dtype) != (shape, dtype):
                    raise GatherError(f"{name}: {shape}, {dtype} on rank {rank}, {known} on another.")
                assert block is not None
                self._holders.setdefault(name, {}).setdefault(block, rank)
        for name, blocks in self._holders.items():
            held = sum(torch.Size(block.shape).numel() for block in blocks)
            if held != self.meta[name].numel():
                raise GatherError(f"{name}: the ranks hold {held} of {self.meta[name].numel()} elements.")

    def rows(self, name: str, first: int, last: int, to: int = 0) -> Tensor | None:
        """Rows [first, last) of a tensor, on the CPU of rank `to`; None on the others."""
        meta = self.meta[name]
        rows = torch.empty((last - first, *meta.shape[1:]), dtype=meta.dtype) if self._rank == to else None
        for block, holder in self._holders[name].items():
            low, high = max(first, block.start[0]), min(last, block.start[0] + block.shape[0])
            if low >= high or self._rank not in (holder, to) or 0 in block.shape:
                continue
            if self._rank == holder:
                part = local_of(self._tensors[name])[low - block.start[0] : high - block.start[0]].detach().cpu()
            else:
                part = torch.empty((high - low, *block.shape[1:]), dtype=meta.dtype)
                dist.recv(part, holder)
            if rows is None:
                dist.send(part.contiguous(), to)
                continue
            columns = [slice(s, s + size) for s, size in zip(block.start[1:], block.shape[1:], strict=True)]
            rows[(slice(low - first, high - first), *columns)] = part
        return rows

    def whole(self, name: str, to: int = 0) -> Tensor | None:
        """A tensor on the CPU of rank `to`; None on the others."""
        return self.rows(name, 0, self.meta[name].shape[0], to)


def _as_block(tensor: Tensor) -> Tensor:
    """The tensor, if this rank's part of it is a block; else the whole of it: only vectors are cut so."""
    if block_of(tensor) is None:
        assert isinstance(tensor, DTensor) and tensor.ndim == 1
        return tensor.full_tensor()
    return tensor
