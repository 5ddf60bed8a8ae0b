"""fp32 master weights as Megatron shares them, and their canonical form.

Megatron keeps each rank's parameters in flat buffers. Without its distributed optimizer a rank's masters are whole
parameters; with it, they are ranges of them: each data-parallel rank has one part of each buffer. Everything that is
kept beside a weight (moments, averages) has the same ranges. The canonical form, in which checkpoints are written, is
put together from the ranges when it is asked for, and taken apart when it was loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallel.engines.megatron_names import Piece


@dataclass(frozen=True)
class Held:
    """One of Megatron's parameters, and the part of it whose master is on this rank.

    Args:
        key: unique among this rank's.
        parameter: Megatron's, in the dtype of forward and backward.
        pieces: the canonical parameters in it.
        copies: how many ranks hold the same master: the gradient norm counts each once; 0 for a copy of the embedding
            that another pipeline stage counts.
    """

    key: str
    parameter: nn.Parameter
    pieces: Sequence[Piece]
    copies: int


def placements(piece: Piece, shared: bool = False) -> tuple[Placement, Placement]:
    """Of a canonical tensor on the mesh (tp, dp).

    Args:
        shared: among data-parallel ranks, too.
    """
    return Replicate() if piece.dimension is None else Shard(piece.dimension), Shard(0) if shared else Replicate()


class Masters:
    """The fp32 weights of this rank.

    Args:
        chunks: Megatron's DistributedDataParallel modules.
        held: all their parameters.
        shapes: shape of each canonical parameter of this pipeline stage.
        mesh: axes (tp, dp) of this pipeline stage's ranks.
        distributed: Megatron's DistributedOptimizer; None where every data-parallel rank holds everything.

    Attributes:
        flat: each master by key, one-dimensional; those of which this rank has a part.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        held: Sequence[Held],
        shapes: Mapping[str, torch.Size],
        mesh: DeviceMesh,
        distributed: Any = None,
    ):
        self.chunks, self.held, self.shapes, self.mesh, self.distributed = chunks, held, shapes, mesh, distributed
        self.flat: dict[str, Tensor] = {}
        self.ranges: dict[str, slice] = {}
        if distributed is None:
            for one in held:
                whole = one.parameter.detach().view(-1)
                self.flat[one.key] = whole if whole.dtype == torch.float32 else whole.float()
                self.ranges[one.key] = slice(0, whole.numel())
            return
        keys = {one.parameter: one.key for one in held}
        of_fp32 = (distributed.model_fp32_groups, distributed.shard_fp32_groups)
        of_bf16 = (distributed.model_float16_groups, distributed.shard_fp32_from_float16_groups)
        for parameters, shards in (pair for groups in (of_fp32, of_bf16) for pair in zip(*groups, strict=True)):
            shards[:] = [shard.detach() for shard in shards]  # views of parameters would be no leaves
            for parameter, shard in zip(parameters, shards, strict=True):
                part = distributed._get_model_param_range_map(parameter)["param"]
                self.flat[keys[parameter]], self.ranges[keys[parameter]] = shard, slice(part.start, part.end)

    def take_gradients(self) -> list[tuple[Tensor, int]]:
        """Hand Megatron's reduced gradients to the masters. Returns them, each with its number of copies."""
        for one in self.held:
            if one.key in self.flat:
                self.flat[one.key].grad = one.parameter.main_grad.view(-1)[self.ranges[one.key]]  # type: ignore[attr-defined]
        return [(flat.grad, one.copies) for one in self.held if (flat := self.flat.get(one.key)) is not None]  # type: ignore[misc]

    @torch.no_grad()
    def publish(self) -> None:
        """Give the parameters the values of the masters, on all data-parallel ranks."""
        if self.distributed is None:
            for one in self.held:
                one.parameter.view(-1).copy_(self.flat[one.key])
            return
        self.distributed._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def assembled(self, flat: Mapping[str, Tensor]) -> dict[str, DTensor]:
        """Canonical form of the masters, or of what is kept beside them under the same keys."""
        found = {}
        for one in self.held:
            whole = self._whole(one, flat.get(one.key))
            for piece in one.pieces:
                local = piece.select(whole.view_as(one.parameter)).reshape(-1, *one.parameter.shape[1:])
                found[piece.name] = self._placed(piece, local)
        return found

    def _whole(self, one: Held, part: Tensor | None) -> Tensor:
        if self.distributed is None:
            assert part is not None
            return part
        whole = torch.zeros(one.parameter.numel(), device=one.parameter.device)
        if part is not None:
            whole[self.ranges[one.key]] = part
        dist.all_reduce(whole, group=self.mesh["dp"].get_group())  # ranges are disjoint: a sum puts them together
        return whole

    def _placed(self, piece: Piece, local: Tensor) -> DTensor:
        if local.untyped_storage().nbytes() != local.nbytes:
            local = local.clone()  # a checkpoint copies whole storages, and takes no DTensor of a part of one
        shape = self.shapes[piece.name]
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(local, self.mesh, placements(piece), run_check=False, shape=shape, stride=stride)
        return whole if self.distributed is None else whole.redistribute(placements=placements(piece, shared=True))

    @torch.no_grad()
    def take_apart(self, canonical: Mapping[str, Any], flat: Mapping[str, Tensor]) -> None:
        """Write canonical tensors into the masters, or into what is kept beside them; `publish` is up to the caller."""
        for one in self.held:
            whole = torch.zeros(one.parameter.shape, device=one.parameter.device)
            for piece in one.pieces:
                placed = canonical[piece.name].redistribute(placements=placements(piece))
                selected = piece.select(whole)
                selected.copy_(placed.to_local().reshape(selected.shape))
            if one.key in flat:
                flat[one.key].copy_(whole.view(-1)[self.ranges[one.key]])
