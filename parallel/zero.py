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

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.mesh import REPLICATE, SHARD


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
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, zero: int, compute: torch.dtype
    ):
        self.model = model
        self.stage = STAGES[zero]
        replicas = mesh[REPLICATE].size()
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the model says what is computed in fp32
        )
        axes = mesh if replicas > 1 else mesh[SHARD]
        for block in blocks:
            fully_shard(block, mesh=axes, mp_policy=policy, reshard_after_forward=self.stage.drop_parameters)
        fully_shard(model, mesh=axes, mp_policy=policy, reshard_after_forward=False)  # the backward starts with it
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

    def release(self) -> None:
        """Free what a forward without a backward gathered."""
        for unit in self.units:
            unit.reshard()

    def changed(self) -> None:
        """To be called when parameters have changed: what is still gathered has the old values."""
        self.release()
