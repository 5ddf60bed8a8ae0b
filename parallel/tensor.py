"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022,
arXiv:2205.05198), from the plan that a model declares.

Inside a region (attention, feed-forward) every rank has all tokens and some of the features or heads; between regions
it has some of the tokens and all features. Entering gathers the sequence, leaving adds up the ranks' partial sums and
keeps the rank's tokens: in the backward pass the two change places. Shared weights are DTensors, computation is on this
rank's part. Every other parameter is held whole, has seen a part of the tokens or heads, and its gradients are added up
over the ranks once a step.

Shape suffixes: B sequences, L tokens of the sequence, l tokens of this rank, N features, V vocabulary, v rows here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel.collectives import all_gather_dim, reduce_scatter_dim, wait_tensor
from parallel.linear import here, product
from parallel.plan import Plan, chosen


class Tensors:
    """A model shared among tensor-parallel ranks.

    Args:
        model: changed in place; may be on the meta device.
        plan: what it declares.
        mesh: the one axis tp.

    Attributes:
        whole_sequence: whether the stream between regions holds all tokens on every rank; for decoding, where there is
            one token. Without gradients only.
    """

    def __init__(self, model: nn.Module, plan: Plan, mesh: DeviceMesh):
        self.mesh = mesh
        self.group = mesh.get_group()
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.whole_sequence = False
        model.slice_sequence = self.slice_sequence  # type: ignore[assignment]
        narrow = plan.groups < self.ranks
        groups_held = {id(module) for _, module in chosen(model, plan.grouped)} if narrow else set()
        for _, module in chosen(model, plan.column):
            if id(module) in groups_held:
                module.forward = _Column(module, plan.groups, self.rank * plan.groups // self.ranks)
            else:
                module.forward = _Column(module, self.ranks, self.rank)
                self._shard(module, "weight", 0)
        for _, module in chosen(model, plan.row):
            module.forward = _Row(module, first=self.rank == 0)
            self._shard(module, "weight", 1)
        for _, module in chosen(model, plan.vocabulary):
            assert isinstance(module.weight, Tensor)
            first = rows_before(module.weight.shape[0], self.ranks, self.rank)
            if isinstance(module, nn.Embedding):
                module.forward = _Lookup(module, self, first)  # type: ignore[method-assign, assignment]
            self._shard(module, "weight", 0)
            model.share_vocabulary(first, self.group)  # type: ignore[operator]
        for _, module in chosen(model, plan.regions):
            module.register_forward_pre_hook(self._entered)
            module.register_forward_hook(self._left)
        for _, module in chosen(model, plan.gathered):
            module.register_forward_hook(lambda _module, _arguments, y_BlN: self.enter(y_BlN))

    def _shard(self, module: nn.Module, name: str, dim: int) -> None:
        parameter = getattr(module, name)
        if isinstance(parameter, DTensor):  # a tied embedding is met twice
            return
        parts = list(parameter.detach().chunk(self.ranks, dim))
        local = parts[self.rank].clone() if self.rank < len(parts) else parameter.detach().narrow(dim, 0, 0).clone()
        shared = DTensor.from_local(
            local, self.mesh, [Shard(dim)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        setattr(module, name, nn.Parameter(shared, requires_grad=parameter.requires_grad))

    def _entered(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.enter(arguments[0]), *arguments[1:]

    def _left(self, _module: nn.Module, _arguments: tuple[Any, ...], partial_BLN: Tensor) -> Tensor:
        return self.leave(partial_BLN)

    def enter(self, x_BlN: Tensor) -> Tensor:
        """x_BLN: all tokens."""
        return x_BlN if self.whole_sequence else _Gather.apply(x_BlN, self.group)

    def leave(self, partial_BLN: Tensor) -> Tensor:
        """sum_BlN: this rank's tokens, added up over the ranks."""
        if self.whole_sequence:
            summed = partial_BLN.clone()
            dist.all_reduce(summed, group=self.group)
            return summed
        return _Scatter.apply(partial_BLN, self.group)

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Inside, `whole_sequence` holds."""
        self.whole_sequence = True
        try:
            yield
        finally:
            self.whole_sequence = False

    def slice_sequence(self, index_L: Tensor) -> Tensor:
        """index_l: this rank's tokens."""
        return index_L if self.whole_sequence else index_L.chunk(self.ranks)[self.rank]

    def add_up(self, gradients: Iterable[Tensor]) -> None:
        """Sum the gradients of parameters that every rank holds whole over the ranks, in place, in one collective."""
        parts = list(gradients)
        if not parts:
            return
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=self.group)
        for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))


def overlap(group: dist.ProcessGroup) -> None:
    """Let the compiler merge this group's collectives with the matrix products beside them, piece by piece (CUDA,
    compiled blocks): each piece is multiplied while the next one travels."""
    import torch._inductor.config as inductor
    from torch.distributed import _symmetric_memory as symmetric

    inductor._micro_pipeline_tp = True
    if torch.__version__ < "2.13":  # from then on every group is ready for it
        symmetric.enable_symm_mem_for_group(group.group_name)


def rows_before(rows: int, ranks: int, rank: int) -> int:
    """The first row of a rank's part (torch.chunk's rule)."""
    return min(rows, rank * -(-rows // ranks))


class _Column:
    """A linear layer of which this rank computes some outputs: part `number` of `parts`."""

    def __init__(self, module: nn.Module, parts: int, number: int):
        self.module, self.parts, self.number = module, parts, number

    def __call__(self, x_BLN: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        y = product(x_BLN, here(weight) if isinstance(weight, DTensor) else self._mine(weight))  # type: ignore[arg-type]
        return y if bias is None else y + self._mine(bias)  # type: ignore[arg-type]

    def _mine(self, rows: Tensor) -> Tensor:
        return rows.chunk(self.parts)[self.number]


class _Row:
    """A linear layer of which this rank has some inputs: its outputs are partial sums. One rank adds the bias."""

    def __init__(self, module: nn.Module, first: bool):
        self.module, self.first = module, first

    def __call__(self, x_BLN: Tensor) -> Tensor:
        y_BLN = product(x_BLN, here(self.module.weight))  # type: ignore[arg-type]
        return y_BLN if self.module.bias is None else y_BLN + self.module.bias * self.first  # type: ignore[operator]


class _Lookup:
    """An embedding of which this rank has some rows."""

    def __init__(self, module: nn.Embedding, tensors: Tensors, first: int):
        self.module, self.tensors, self.first = module, tensors, first

    def __call__(self, tokens_BL: Tensor) -> Tensor:
        weight_vN = here(self.module.weight)
        ids_BL = tokens_BL - self.first
        elsewhere_BL = (ids_BL < 0) | (ids_BL >= weight_vN.shape[0])
        if weight_vN.shape[0] == 0:
            weight_vN = F.pad(weight_vN, (0, 0, 0, 1))
        x_BLN = F.embedding(ids_BL.masked_fill(elsewhere_BL, 0), weight_vN)
        return self.tensors.leave(x_BLN.masked_fill(elsewhere_BL[..., None], 0))


def _all_gather(x_BlN: Tensor, group: dist.ProcessGroup) -> Tensor:
    return wait_tensor(all_gather_dim(x_BlN.contiguous(), 1, group))


def _reduce_scatter(x_BLN: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed = x_BLN.float() if x_BLN.device.type == "cpu" else x_BLN  # gloo adds up no 16-bit numbers
    return wait_tensor(reduce_scatter_dim(summed.contiguous(), "sum", 1, group)).to(x_BLN.dtype)


class _Gather(torch.autograd.Function):
    """All tokens from everybody's; the gradients of all come back added up."""

    @staticmethod
    def forward(ctx: Any, x_BlN: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x_BlN, group)

    @staticmethod
    def backward(ctx: Any, grad_BLN: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _reduce_scatter(grad_BLN, ctx.group), None


class _Scatter(torch.autograd.Function):
    """This rank's tokens of everybody's sum."""

    @staticmethod
    def forward(ctx: Any, x_BLN: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x_BLN, group)

    @staticmethod
    def backward(ctx: Any, grad_BlN: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_gather(grad_BlN, ctx.group), None
