"""Where a model's tensors live: cut into stages; each shared among tensor-parallel, then data-parallel ranks."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from parallel import context, fp8, linear
from parallel.engine import Settings
from parallel.expert import share_experts
from parallel.layout import DEFERRING_SCHEDULES, Layout
from parallel.mesh import PIPELINE, TENSOR, Mesh
from parallel.offload import materialise, policy
from parallel.pipeline import Part, Placed, cut, rank_of
from parallel.plan import chosen
from parallel.recompute import recompute
from parallel.reduce import local_of
from parallel.tensor import Tensors, overlap
from parallel.whole import Whole
from parallel.zero import Sharded


class Parts(nn.ModuleList):
    """The parts of a rank as one module, for an optimizer."""

    @property
    def blocks(self) -> nn.ModuleList:
        return nn.ModuleList(block for part in self for block in part.blocks)  # type: ignore[union-attr]


class Placement:
    """A model's parts on this rank, and its optimizer. All ranks make theirs together.

    Args:
        model: declares `plan` and `part` where the layout needs them; may be on the meta device. Changed in place.
        layout, mesh: where it goes.
        device: of this rank.
        compute: dtype of forward and backward.
        settings: compilation.
        initialise: fills a part that was on the meta device.
        optimizer: makes the optimizer of a placed model.

    Attributes:
        parts: the stages of this rank.
        tensors: of each, where tensor-parallel ranks share it.
        parameters, buffers: of all of them, by name; of buffers those that are part of a model's state.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        mesh: Mesh,
        device: torch.device,
        compute: torch.dtype,
        settings: Settings,
        initialise: Callable[[nn.Module], None] | None,
        optimizer: Callable[[nn.Module], Optimizer],
    ):
        self.layout, self.mesh = layout, mesh
        self.tensors: list[Tensors] = []
        self.stages = layout.pp * layout.virtual_stages
        self.tied: set[str] = set()
        models = self._cut(model)
        placed: dict[int, Placed] = {}
        for stage, part in models.items():
            self._prepare(part, settings)
            on_meta = any(p.is_meta for p in part.parameters())
            if not on_meta:
                part.to(device)
            if layout.dp * layout.cp > 1 or layout.offload == "parameters":
                blocks = [block for block in part.blocks if block is not None]  # type: ignore[union-attr]
                experts = [m for _, m in chosen(part, part.plan.experts)] if layout.ep > 1 else []  # type: ignore[union-attr, arg-type]
                offload = policy(layout.offload, device)
                placed[stage] = Sharded(part, blocks, mesh.data, layout.zero, compute, experts, mesh.experts, offload)
            if on_meta:
                assert initialise is not None
                materialise(part, layout.offload, device)
                initialise(part)
        # Before Whole, whose copies are nothing to optimise.
        self.optimizer = optimizer(Parts(models.values()) if self.stages > 1 else models[0])
        self.parts = [Part(stage, placed.get(stage) or Whole(part, compute)) for stage, part in models.items()]
        self.parameters: dict[str, Tensor] = {}
        for here in reversed(self.parts):  # of what the first stage and the last both hold, the first's
            self.parameters |= here.placed.parameters
        self.buffers = {name: buffer for here in self.parts for name, buffer in _lasting(here.model)}

    def _cut(self, model: nn.Module) -> dict[int, nn.Module]:
        """This rank's stages."""
        if self.stages == 1:
            return {0: model}
        layers = cut(len(model.blocks), self.stages)  # type: ignore[arg-type]

        def part(stage: int) -> nn.Module:
            return model.part(layers[stage], reads_tokens=stage == 0, answers=stage == self.stages - 1)  # type: ignore[operator]

        self.tied = {n for n, _ in part(0).named_parameters()} & {
            n for n, _ in part(self.stages - 1).named_parameters()
        }
        mine = [stage for stage in range(self.stages) if rank_of(stage, self.layout) == self.mesh.pp_rank]
        return {stage: part(stage) for stage in mine}

    def _prepare(self, part: nn.Module, settings: Settings) -> None:
        """Everything that changes how a part computes, before it is sharded."""
        blocks = [block for block in part.blocks if block is not None]  # type: ignore[union-attr]
        if settings.precision == "fp8":
            fp8.convert(blocks)
        if self.layout.tp > 1:
            self.tensors.append(Tensors(part, part.plan, self.mesh.tensor))  # type: ignore[arg-type]
            if self.layout.async_tp:
                overlap(self.tensors[-1].group)
        if self.layout.cp > 1:
            context.install(part, self.mesh.context_group, self.layout.ring)
        if self.layout.tp * self.layout.cp * self.layout.ep > 1:
            share_experts(part, part.plan, self.layout, self.mesh)  # type: ignore[arg-type]
        if self.layout.pp > 1 and self.layout.schedule in DEFERRING_SCHEDULES:
            linear.install(part)
        recompute(blocks, self.layout.recompute)
        if settings.compile:
            for block in blocks:
                block.compile()

    def copies(self, name: str) -> int:
        """How many ranks of a stage hold the same piece of a parameter."""
        distinct = 1
        for _, size in _sharding(self.parameters[name]):
            distinct *= size
        return self.layout.world_size // self.layout.pp // distinct

    @property
    def counted_elsewhere(self) -> set[str]:
        """Parameters here whose gradient is the first stage's to count."""
        return set() if self._has(0) else self.tied

    def _has(self, stage: int) -> bool:
        return rank_of(stage, self.layout) == self.mesh.pp_rank

    def add_up(self) -> None:
        """Complete the gradients of a step: over the ranks that saw other tokens or heads, and over the stages that
        hold the same parameter."""
        if self.tensors:
            self.tensors[0].add_up(
                local_of(parameter.grad)
                for part in self.parts
                for parameter in part.placed.parameters.values()
                if parameter.grad is not None and TENSOR not in dict(_sharding(parameter))
            )
        first, last = 0, self.stages - 1
        if not self.tied or not (self._has(first) or self._has(last)):
            return
        if self._has(first) and self._has(last):
            for one, other in self._twins():
                assert one.grad is not None and other.grad is not None
                local_of(one.grad).add_(local_of(other.grad))
                local_of(other.grad).copy_(local_of(one.grad))
            return
        peer = rank_of(last if self._has(first) else first, self.layout)
        group = self.mesh.axes[PIPELINE].get_group()
        for name in sorted(self.tied):
            gradient = self.parameters[name].grad
            assert gradient is not None
            mine, theirs = local_of(gradient).contiguous(), torch.empty_like(local_of(gradient))
            both = [
                dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
                dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
            ]
            for work in dist.batch_isend_irecv(both):
                work.wait()
            local_of(gradient).add_(theirs)

    def _twins(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What this rank holds twice, where it has the first stage and the last."""
        if self.stages > 1 and self._has(0) and self._has(self.stages - 1):
            for name in sorted(self.tied):
                yield self.parts[0].placed.parameters[name], self.parts[-1].placed.parameters[name]

    @torch.no_grad()
    def copy_twins(self) -> None:
        """To be called when parameters or moments were overwritten: what is held twice follows its first."""
        for one, other in self._twins():
            local_of(other).copy_(local_of(one))
            for name, value in self.optimizer.state[one].items():
                local_of(self.optimizer.state[other][name]).copy_(local_of(value))


def _lasting(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict would hold."""
    for owner, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=owner, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _sharding(parameter: Tensor) -> Iterator[tuple[str, int]]:
    """The mesh axes that a parameter is sharded over, with their sizes."""
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for name, size, placement in zip(names, parameter.device_mesh.shape, parameter.placements, strict=True):
            if isinstance(placement, Shard):
                yield name, size
