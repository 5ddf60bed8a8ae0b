"""Tensors by name out of flat partitions, and back.

DeepSpeed joins parameters into long vectors and gives each data-parallel rank a piece of them, which begins and ends
anywhere in a parameter. A checkpoint is by parameter: here each rank gets its rows of every tensor as a DTensor. One
tensor at a time is whole on a rank, never the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

TENSOR, DATA = "tp", "dp"


@dataclass(frozen=True)
class Fragment:
    """What this rank holds of one parameter.

    Args:
        shape: of the parameter on this rank before data-parallel ranks share it.
        tensor_dim: dimension that tensor-parallel ranks share; None where each has the whole parameter.
        flat: which of the vectors it is in.
        offset: first element in that vector.
        start: first element in the flattened parameter.
        count: elements; 0 where others hold them all.
    """

    shape: torch.Size
    tensor_dim: int | None
    flat: int
    offset: int
    start: int
    count: int


class Partitions:
    """Where the elements of every parameter are.

    Args:
        fragments: by parameter name.
        tp: tensor-parallel ranks; the innermost ones.
        device: type of the device that holds the vectors.
        shared: whether data-parallel ranks hold pieces; else each holds everything.
    """

    def __init__(self, fragments: Mapping[str, Fragment], tp: int, device: str, shared: bool):
        self.fragments = fragments
        self.shared = shared
        ranks = torch.arange(dist.get_world_size()).view(-1, tp).T.contiguous()
        # tp before dp: a dimension that both share is cut by tp first.
        self.mesh = DeviceMesh(device, ranks, mesh_dim_names=(TENSOR, DATA))

    def whole(self, name: str, flats: Sequence[Tensor]) -> Tensor:
        """What the data-parallel ranks hold of a parameter, put together on each of them."""
        fragment = self.fragments[name]
        flat = flats[fragment.flat].detach()
        if not self.shared:
            return flat.view(fragment.shape)
        full = torch.zeros(fragment.shape.numel(), dtype=flat.dtype, device=flat.device)
        held = slice(fragment.start, fragment.start + fragment.count)
        full[held] = flat[fragment.offset : fragment.offset + fragment.count]
        dist.all_reduce(full, group=self.mesh[DATA].get_group())
        return full.view(fragment.shape)

    def tensor(self, name: str, flats: Sequence[Tensor]) -> DTensor:
        """This rank's rows of a parameter: a copy, but the live tensor where nothing is shared."""
        full = self.whole(name, flats)
        fragment = self.fragments[name]
        data: Placement = Replicate()
        local = full
        if self.shared:
            size, rank = self.mesh[DATA].size(), self.mesh[DATA].get_local_rank()
            rows = -(-full.shape[0] // size)  # as Shard cuts
            local, data = full[rows * rank : rows * (rank + 1)].clone(), Shard(0)
        tensor, shape = self._over_tensor_ranks(fragment)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, (tensor, data), run_check=False, shape=shape, stride=stride)

    def put(self, name: str, tensor: Tensor, flats: Sequence[Tensor]) -> None:
        """Overwrite what this rank holds of a parameter.

        Args:
            tensor: as `tensor` gives it, or the whole parameter of this rank.
        """
        fragment = self.fragments[name]
        if isinstance(tensor, DTensor):
            tensor = tensor.redistribute(placements=(tensor.placements[0], Replicate())).to_local()
        flat = flats[fragment.flat].detach().view(-1)
        held = slice(fragment.start, fragment.start + fragment.count)
        flat[fragment.offset : fragment.offset + fragment.count] = tensor.detach().reshape(-1)[held].to(flat.device)

    def _over_tensor_ranks(self, fragment: Fragment) -> tuple[Placement, torch.Size]:
        """How tensor-parallel ranks share the parameter, and its whole shape."""
        if fragment.tensor_dim is None:
            return Replicate(), fragment.shape
        shape = list(fragment.shape)
        shape[fragment.tensor_dim] *= self.mesh[TENSOR].size()
        return Shard(fragment.tensor_dim), torch.Size(shape)


class Placed:
    """What DeepSpeed made of the parameters: one class per layout of its vectors.

    Attributes:
        flats: the fp32 vectors that this rank's optimizer updates.
        partitions: where in them each parameter is.
    """

    flats: list[Tensor]
    partitions: Partitions

    def __init__(self, wrapped: Any, fragments: dict[str, Fragment], tp: int, shared: bool = True):
        self.zero = wrapped.optimizer
        self.partitions = Partitions(fragments, tp, self.flats[0].device.type, shared)

    def norm(self) -> Tensor:
        """Norm of the gradients over all ranks, as DeepSpeed averaged them; known while its optimizer steps."""
        return torch.as_tensor(self.zero._global_grad_norm)

    def changed(self) -> None:
        """To be called when the vectors have changed: renews what forward and backward compute with."""
        raise NotImplementedError

    @torch.no_grad()
    def put_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Overwrite the vectors with parameters as they were before DeepSpeed rounded them."""
        rank, size = self.partitions.mesh[TENSOR].get_local_rank(), self.partitions.mesh[TENSOR].size()
        for name, fragment in self.partitions.fragments.items():
            master = masters[name]
            if fragment.tensor_dim is not None:
                master = master.chunk(size, fragment.tensor_dim)[rank]
            self.partitions.put(name, master, self.flats)


class Replicated(Placed):
    """ZeRO 0: the parameters themselves."""

    def __init__(self, wrapped: Any, shapes: "Shapes"):
        self.flats = list(shapes.parameters.values())
        fragments = {
            name: shapes.fragment(name, flat, 0, 0, parameter.numel())
            for flat, (name, parameter) in enumerate(shapes.parameters.items())
        }
        super().__init__(wrapped, fragments, shapes.tp, shared=False)

    def norm(self) -> Tensor:
        group = self.partitions.mesh[TENSOR]
        total = torch.zeros((), dtype=torch.float64, device=self.flats[0].device)
        for parameter, fragment in zip(self.flats, self.partitions.fragments.values(), strict=True):
            if parameter.grad is not None and (fragment.tensor_dim is not None or group.get_local_rank() == 0):
                total += parameter.grad.double().square().sum()
        dist.all_reduce(total, group=group.get_group())
        return total.sqrt()

    def changed(self) -> None:
        """Nothing is derived from them."""


class Flattened(Placed):
    """ZeRO 1 and 2: all parameters of an optimizer group in one vector, of which each rank has a part."""

    def __init__(self, wrapped: Any, shapes: "Shapes"):
        zero = wrapped.optimizer
        bf16 = hasattr(zero, "bf16_groups")
        groups = zero.bf16_groups if bf16 else zero.bit16_groups
        self.flats = list(zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups)
        fragments = {}
        for flat, parameters in enumerate(groups):
            for parameter in parameters:
                held = parameter._hp_mapping
                offset, start, count = 0, 0, 0
                if held is not None:
                    offset, start = held.hp_fragment_address.start, held.lp_fragment_address.start
                    count = held.hp_fragment_address.numel
                name = shapes.names[parameter]
                fragments[name] = shapes.fragment(name, flat, offset, start, count)
        super().__init__(wrapped, fragments, shapes.tp)

    def changed(self) -> None:
        self.zero.update_lp_params()


class Split(Placed):
    """ZeRO 3: each parameter is cut into equal parts, the last of them padded, and a rank's parts are one vector."""

    def __init__(self, wrapped: Any, shapes: "Shapes"):
        zero = wrapped.optimizer
        self.flats = list(zero.fp32_partitioned_groups_flat)
        rank = dist.get_rank(wrapped.data_parallel_group)
        fragments = {}
        for name, parameter in shapes.parameters.items():
            flat, offset, part = zero.grad_position[zero.get_param_id(parameter)]
            start = min(part * rank, parameter.ds_numel)
            count = min(part, parameter.ds_numel - start)
            fragments[name] = shapes.fragment(name, flat, offset, start, count)
        super().__init__(wrapped, fragments, shapes.tp)

    def changed(self) -> None:
        self.zero._partition_all_parameters()  # it keeps some gathered after a forward without a backward
        for flat in range(len(self.flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(flat)


class Shapes:
    """Parameters as DeepSpeed has them, beside their shapes before tensor-parallel ranks shared them.

    Args:
        parameters: by name, in the model's order.
        whole: shapes by name.
        tp: tensor-parallel ranks.
    """

    def __init__(self, parameters: dict[str, Any], whole: Mapping[str, torch.Size], tp: int):
        self.parameters = parameters
        self.names = {parameter: name for name, parameter in parameters.items()}
        self.whole = whole
        self.tp = tp

    def fragment(self, name: str, flat: int, offset: int, start: int, count: int) -> Fragment:
        parameter = self.parameters[name]
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        shared = [dim for dim, (here, whole) in enumerate(zip(shape, self.whole[name], strict=True)) if here != whole]
        return Fragment(shape, shared[0] if shared else None, flat, offset, start, count)


def placed(wrapped: Any, parameters: dict[str, Any], whole: Mapping[str, torch.Size], zero: int, tp: int) -> Placed:
    """What a DeepSpeed engine made of a model's parameters.

    Args:
        wrapped: the DeepSpeed engine.
        parameters: the model's, by name.
        whole: their shapes before.
        zero: the stage.
        tp: tensor-parallel ranks.
    """
    made = {0: Replicated, 1: Flattened, 2: Flattened, 3: Split}[zero]
    return made(wrapped, Shapes(parameters, whole, tp))
