"""Expert parallelism (Lepikhin et al. 2020, arXiv:2006.16668): each rank holds some experts of a layer; rows travel to
the ranks of the experts that they were sent to, and back.

The ranks that share experts are cut out of the data- and context-parallel ones, which have other tokens each. Beside it
the width of every expert is shared among tensor-parallel ranks, which have the same tokens.

Shape suffixes: R rows that leave, r rows that arrive, N features, B sequences, E experts, e experts of this rank,
P ranks.
"""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel.layout import Layout
from parallel.mesh import EXPERT, TENSOR, Mesh
from parallel.plan import Plan, chosen


def share_experts(model: nn.Module, plan: Plan, layout: Layout, mesh: Mesh) -> None:
    """Leave to this rank its part of the experts.

    Args:
        model: changed in place; may be on the meta device.
        plan: what it declares.
        layout, mesh: where it goes.
    """
    for name, module in chosen(model, plan.experts):
        axes = [axis for axis, size in ((EXPERT, layout.ep), (TENSOR, layout.tp)) if size > 1]
        if axes:
            for parameter, _ in list(module.named_parameters(recurse=False)):
                width = _dim_of_width(f"{name}.{parameter}", plan)
                dims = [{EXPERT: 0, TENSOR: width}[axis] for axis in axes]
                _shard(module, parameter, mesh.of_experts[tuple(axes)], dims)
        if layout.ep > 1:
            module.forward = Exchange(module.forward, mesh.of_experts[EXPERT].get_group())
    for _, router in chosen(model, plan.routers):
        router.share = 1 / layout.tp  # type: ignore[assignment]
        if layout.cp > 1:
            router.over_sequence = _adder(mesh.context_group)  # type: ignore[assignment]


def _dim_of_width(name: str, plan: Plan) -> int:
    """Of a stack of matrices: rows are outputs, columns inputs."""
    return 1 if any(fnmatch.fnmatchcase(name, pattern) for pattern in plan.column) else 2


def _shard(module: nn.Module, name: str, mesh: DeviceMesh, dims: Sequence[int]) -> None:
    parameter = getattr(module, name)
    local = parameter.detach()
    for axis, dim in enumerate(dims):
        parts = local.chunk(mesh.size(axis), dim)
        rank = mesh.get_local_rank(axis)
        local = parts[rank] if rank < len(parts) else local.narrow(dim, 0, 0)
    shared = DTensor.from_local(
        local.clone(memory_format=torch.contiguous_format),
        mesh,
        [Shard(dim) for dim in dims],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    setattr(module, name, nn.Parameter(shared, requires_grad=parameter.requires_grad))


def _adder(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    def add_up(counts_BE: Tensor) -> Tensor:
        """counts_BE of whole sequences."""
        summed = counts_BE.clone()
        dist.all_reduce(summed, group=group)
        return summed

    return add_up


class Exchange:
    """The experts of all ranks, of which this one has some.

    Args:
        experts: (rows_rN, counts_e) -> rows_rN: those of this rank; rows are sorted by expert.
        group: the ranks, which hold equal numbers of experts, in order.
    """

    def __init__(self, experts: Callable[[Tensor, Tensor], Tensor], group: dist.ProcessGroup):
        self.experts, self.group = experts, group

    @torch.compiler.disable
    def __call__(self, rows_RN: Tensor, counts_E: Tensor) -> Tensor:
        """Each row through its expert, wherever that is."""
        there_Pe = counts_E.view(self.group.size(), -1)
        here_Pe = torch.empty_like(there_Pe)
        dist.all_to_all_single(here_Pe, there_Pe, group=self.group)
        sent, received = torch.stack([there_Pe.sum(1), here_Pe.sum(1)]).tolist()
        rows_rN = _AllToAll.apply(rows_RN, sent, received, self.group)
        # They come sorted by sender, then by expert.
        expert_e = torch.arange(here_Pe.shape[1], device=counts_E.device)
        expert_Pe = expert_e.expand_as(here_Pe)
        expert_r = expert_Pe.flatten().repeat_interleave(here_Pe.flatten(), output_size=rows_rN.shape[0])
        order_r = expert_r.argsort(stable=True)
        rows_rN = self.experts(rows_rN.index_select(0, order_r), here_Pe.sum(0))
        rows_rN = rows_rN.index_select(0, order_r.argsort())
        return _AllToAll.apply(rows_rN, received, sent, self.group)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks: the first `sent[0]` to the first, and so on. Gradients travel back."""

    @staticmethod
    def forward(ctx: Any, rows_RN: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows_RN, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad_rN: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _all_to_all(grad_rN, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows_RN: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    rows_rN = rows_RN.new_empty(sum(received), rows_RN.shape[1])
    dist.all_to_all_single(rows_rN, rows_RN.contiguous(), received, sent, group=group)
    return rows_rN
