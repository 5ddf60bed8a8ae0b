"""Collectives on one flat tensor, which torch 2.13 renamed."""

import torch.distributed as dist
import torch.distributed._functional_collectives as functional

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""`all_gather(output, input, group=...)`: everybody's input, one after the other."""

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""`reduce_scatter(output, input, group=...)`: this rank's part of the sum of everybody's inputs."""

all_gather_dim = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
"""`all_gather_dim(input, gather_dim, group)`: a new tensor, which compilers see through; `wait_tensor` waits for it."""

reduce_scatter_dim = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
"""`reduce_scatter_dim(input, "sum", scatter_dim, group)`: likewise."""

wait_tensor = functional.wait_tensor
