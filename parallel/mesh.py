"""The device mesh of a layout: ranks in the order pp, dp_replicate, dp_shard, cp, tp, the last next to each other.

The ranks that share a sequence share the training state too: gradients are of sums, so what context parallelism must
add up is added up with the data-parallel ranks'. So the axes that FSDP2 sees hold cp as a part of dp_shard. Two more
views of the same ranks, which exist where they are asked for, tell cp apart, and cut ep out of the data-parallel ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import Layout

PIPELINE, REPLICATE, SHARD, TENSOR = "pp", "dp_replicate", "dp_shard", "tp"
CONTEXT = "cp"
EXPERT_REPLICATE, EXPERT_SHARD, EXPERT = "ep_replicate", "ep_shard", "ep"


class Mesh:
    """All ranks of a run; every rank makes it together.

    Args:
        layout: sizes of the axes. ZeRO 0 shares nothing, so there every data-parallel rank is a replica.
        device: of this rank.

    Attributes:
        axes: (pp, dp_replicate, dp_shard, tp): where parameters live.
        of_experts: (pp, ep_replicate, ep_shard, ep, tp): where those of experts live; without ep, `axes`.
        pp_rank, dp_rank, cp_rank, tp_rank: this rank's place.
        counts: whether this rank's figures are counted: others of the same data say the same.
    """

    def __init__(self, layout: Layout, device: torch.device):
        self.layout = layout
        data = layout.dp * layout.cp
        replicas, shards = (data, 1) if layout.zero == 0 else (layout.dp_replicate, layout.dp_shard * layout.cp)
        self.axes = _mesh(device, **{PIPELINE: layout.pp, REPLICATE: replicas, SHARD: shards, TENSOR: layout.tp})
        self._sequences = None
        if layout.cp > 1:
            sizes = {PIPELINE: layout.pp, "dp": layout.dp, CONTEXT: layout.cp, TENSOR: layout.tp}
            self._sequences = _mesh(device, **sizes)
        self.of_experts = self.axes
        if layout.ep > 1:
            replicas, shards = (data // layout.ep, 1) if layout.zero == 0 else (replicas, shards // layout.ep)
            sizes = {EXPERT_REPLICATE: replicas, EXPERT_SHARD: shards, EXPERT: layout.ep, TENSOR: layout.tp}
            self.of_experts = _mesh(device, **{PIPELINE: layout.pp, **sizes})
        rank = dist.get_rank()
        self.tp_rank = rank % layout.tp
        self.cp_rank = rank // layout.tp % layout.cp
        self.dp_rank = rank // (layout.tp * layout.cp) % layout.dp
        self.pp_rank = rank // (layout.tp * data)
        self.counts = self.tp_rank == 0 and self.cp_rank == 0

    @property
    def data(self) -> DeviceMesh:
        """The axes over which gradients are added up."""
        return self.axes[REPLICATE, SHARD]

    def over_data(self, sums: Tensor) -> Tensor:
        """Added up over the ranks that saw other tokens, in place."""
        for axis in (REPLICATE, SHARD):
            if self.axes[axis].size() > 1:
                dist.all_reduce(sums, group=self.axes[axis].get_group())
        return sums

    @property
    def experts(self) -> DeviceMesh | None:
        """The axes over which gradients of experts are added up, where they are shared."""
        return self.of_experts[EXPERT_REPLICATE, EXPERT_SHARD] if self.layout.ep > 1 else None

    @property
    def tensor(self) -> DeviceMesh:
        return self.axes[TENSOR]

    @property
    def context_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's sequences."""
        assert self._sequences is not None, "only with cp > 1"
        return self._sequences[CONTEXT].get_group()


def _mesh(device: torch.device, **sizes: int) -> DeviceMesh:
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
