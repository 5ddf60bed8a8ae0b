"""Training state in host memory: the moments, which come to the device a part at a time (`optimizer`); or all of it,
with the update computed by the host (`parameters`: FSDP2's CPUOffloadPolicy; Ren et al. 2021, arXiv:2101.06840).

    offload      on the device                                     moved per step and parameter, fp32 AdamW
    none         weight, gradient, moments                         nothing
    optimizer    weight, gradient, moments of a part               8 bytes there, 8 back
    parameters   a unit's gathered weights at a time               4 bytes there per gathering, 4 back per reduction
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.optim import Optimizer

from parallel.reduce import local_of

PART_ELEMENTS = 2**26
"""Parameters whose moments are on the device together, unless one tensor has more: 0.5 GB of fp32 AdamW."""


class Offloaded:
    """Steps of an optimizer whose moments wait in host memory.

    Args:
        optimizer: any that leaves parameters without a gradient alone.
        parameters: its own, in an order that is the same on all ranks: some optimizers work together.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor]):
        self.optimizer = optimizer
        self.parts: list[list[Tensor]] = [[]]
        filled = 0
        for parameter in parameters:
            if self.parts[-1] and filled + parameter.numel() > PART_ELEMENTS:
                self.parts.append([])
                filled = 0
            self.parts[-1].append(parameter)
            filled += parameter.numel()

    @torch.no_grad()
    def step(self) -> None:
        """One step, part by part."""
        gradients = {parameter: parameter.grad for part in self.parts for parameter in part}
        for parameter in gradients:
            parameter.grad = None
        for part in self.parts:
            homes = {parameter: self._fetch(parameter) for parameter in part}
            for parameter in part:
                parameter.grad = gradients[parameter]
            self.optimizer.step()
            for parameter in part:
                parameter.grad = None
                self._store(parameter, homes[parameter])

    def _fetch(self, parameter: Tensor) -> dict[str, Tensor]:
        """Put copies on the device in the place of the moments, which are returned. Counters stay where they are."""
        state = self.optimizer.state[parameter]
        homes = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
        for name, value in homes.items():
            state[name] = value.to(parameter.device, copy=True)
        return homes

    def _store(self, parameter: Tensor, homes: dict[str, Tensor]) -> None:
        """The opposite; moments that the optimizer has only just made get their home."""
        state = self.optimizer.state[parameter]
        for name, value in state.items():
            if name in homes:
                local_of(homes[name]).copy_(local_of(value))
                state[name] = homes[name]
            elif isinstance(value, Tensor) and value.numel() > 1:
                state[name] = value.to("cpu", copy=True)


def policy(offload: str, device: torch.device) -> OffloadPolicy:
    """FSDP2's, for a value of `Layout.offload`."""
    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload == "parameters" else OffloadPolicy()


def materialise(model: nn.Module, offload: str, device: torch.device) -> None:
    """Storage for a sharded model that is on the meta device: parameters where they live, buffers on the device."""
    model.to_empty(device="cpu" if offload == "parameters" else device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
