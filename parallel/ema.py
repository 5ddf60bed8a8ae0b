"""Exponential moving average of the weights, in fp32, sharded as the weights are (Polyak & Juditsky 1992)."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.reduce import local_of


class Average:
    """a <- a + w (p - a) after each update, where w = 1 - decay; with debiasing w = (1 - decay) / (1 - decay^t) at the
    t-th update: the average that starts from nothing and is divided by its weight (as Adam's moments, Kingma & Ba
    2015, section 3), so that the first weights are forgotten at once.

    Args:
        parameters: by name; the live tensors.
        decay: per update, in (0, 1).
        debias: forget the initial weights.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float, debias: bool):
        self.parameters = parameters
        self.decay = decay
        self.debias = debias
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
        device = next(iter(parameters.values())).device
        self.updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Follow the parameters.

        Args:
            skipped: 1 where this step changed nothing; then neither does this.
        """
        taken = 1 - skipped.to(self.updates.device).double()
        self.updates += taken
        weight = taken * (1 - self.decay)
        if self.debias:
            weight = weight / (1 - self.decay ** self.updates.clamp(min=1))
        for name, average in self.tensors.items():
            local_of(average).lerp_(local_of(self.parameters[name]), weight.float())

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters, one tensor at a time. Again to undo."""
        for name, average in self.tensors.items():
            parameter = local_of(self.parameters[name])
            held = parameter.clone()
            parameter.copy_(local_of(average))
            local_of(average).copy_(held)

    def state(self) -> dict[str, Tensor | DTensor]:
        return {**{f"ema.{name}": tensor for name, tensor in self.tensors.items()}, "engine.ema_updates": self.updates}
