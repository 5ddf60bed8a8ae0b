"""ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054): four stages, one mechanism (FSDP2's `fully_shard`), one table.

A step has M micro-batches; U units are sharded (each block, and the rest of the model). What moves per step:

    stage  parameters between micro-batches  gradients between micro-batches  all-gathers    reductions
    0      kept                              kept whole                       0              U (all-reduce)
    1      kept                              kept whole                       U              U (reduce-scatter)
    2      kept                              kept as shards                   U              M x U
    3      dropped after each use            kept as shards                   M x (2 U - 1)  M x U

(The last unit of the forward is the first of the backward, and is not dropped in between.) With replicas of the
shards (HSDP) each step adds U all-reduces, whatever the stage.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Args:
        drop_parameters: free the gathered parameters after each use.
        reduce_every: reduce gradients after every micro-batch, not only after the last.
    """

    drop_parameters: bool
    reduce_every: bool


STAGES = {
    0: Stage(drop_parameters=False, reduce_every=False),
    1: Stage(drop_parameters=False, reduce_every=False),
    2: Stage(drop_parameters=False, reduce_every=True),
    3: Stage(drop_parameters=True, reduce_every=True),
}


class Sharded:
    """A model whose training state is shared among the ranks of a mesh.

    Args:
        model: changed in place; its parameters become DTensors.
        blocks: the parts of it that are gathered one by one; the rest is one more unit.
        mesh: axes (dp_replicate, dp_shard).
        zero: the stage.
        compute: dtype of forward and backward; parameters and reductions stay fp32.
        experts: parts of blocks that live on another mesh; they make units of their own.
        of_experts: that mesh: axes (ep_replicate, ep_shard).
        offload: whether the shards live in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        mesh: DeviceMesh,
        zero: int,
        compute: torch.dtype,
        experts: Iterable[nn.Module] = (),
        of_experts: DeviceMesh | None = None,
        offload: OffloadPolicy = OffloadPolicy(),
    ):
        self.model = model
        self.stage = STAGES[zero]
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the model says what is computed in fp32
        )

        def shard(module: nn.Module, drop: bool, mesh: DeviceMesh) -> None:
            axes = mesh if mesh.size(0) > 1 else mesh[mesh.mesh_dim_names[1]]  # type: ignore[index]
            free = partial(_free_dim, ranks=mesh.size(1))
            options: dict[str, Any] = {"mp_policy": policy, "offload_policy": offload, "shard_placement_fn": free}
            fully_shard(module, mesh=axes, reshard_after_forward=drop, **options)

        for module in experts:
            assert of_experts is not None
            shard(module, self.stage.drop_parameters, of_experts)
        for block in blocks:
            shard(block, self.stage.drop_parameters, mesh)
        shard(model, False, mesh)  # the backward starts with it
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)  # sums, never means: the engine divides, once
            unit.set_force_sum_reduction_for_comms(True)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The sharded fp32 parameters by name; gradients arrive here."""
        return dict(self.model.named_parameters())

    def accumulate(self, last: bool) -> None:
        """To be called before each micro-batch of a step.

        Args:
            last: whether it is the last one of the step.
        """
        root = self.units[0]
        root.set_is_last_backward(last)
        root.set_requires_gradient_sync(last or self.stage.reduce_every)
        root.set_requires_all_reduce(last)
        root.set_reshard_after_backward(last or self.stage.drop_parameters)

    def reduce(self) -> None:
        """Add up the gradients over the ranks after backward passes none of which was the last. FSDP2 does so at the
        end of a unit's backward pass; gradients of deferred weights come after it. (torch's own pipelines end so.)
        """
        self.accumulate(last=True)
        states = [unit._get_fsdp_state() for unit in self.units]
        for state in states:
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.13; before
            for group in groups:
                if group is not None:
                    group.post_backward()
        states[0]._root_post_backward_final_callback()

    def release(self) -> None:
        """Free what a forward without a backward gathered."""
        for unit in self.units:
            unit.reshard()

    def changed(self) -> None:
        """To be called when parameters have changed: what is still gathered has the old values."""
        self.release()


def _free_dim(parameter: nn.Parameter, ranks: int) -> Shard:
    """The first dim that is not shared among other ranks already, and that so many ranks can share evenly: FSDP2 cuts
    only the first one unevenly. Of a stack of a few matrices, the last ranks would have none."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    taken = {placement.dim for placement in placements if isinstance(placement, Shard)}
    free = [dim for dim in range(parameter.ndim) if dim not in taken]
    even = [dim for dim in free if parameter.shape[dim] % ranks == 0 or (dim == 0 and parameter.ndim < 3)]
    return Shard((even or free)[0])
