"""The device mesh of a layout."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import Layout

REPLICATE, SHARD = "dp_replicate", "dp_shard"


def data_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The two data-parallel axes. ZeRO 0 shares nothing, so there every rank is a replica and a shard is whole."""
    sizes = (layout.dp, 1) if layout.zero == 0 else (layout.dp_replicate, layout.dp_shard)
    return init_device_mesh(device.type, sizes, mesh_dim_names=(REPLICATE, SHARD))
