"""A model on one process: nothing is shared, so nothing is gathered, and a step is plain PyTorch.

FSDP2 would do, and does on several processes, but it copies what one process has already. In 16-bit compute the model
runs on copies of its fp32 parameters, which are made once per step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parallel.reduce import local_of


class Whole:
    """A model whose forward and backward may have another dtype than its parameters.

    Args:
        model: changed in place: where `compute` is not fp32, its modules hold the copies from now on.
        compute: dtype of forward and backward.

    Attributes:
        parameters: the fp32 parameters by name; gradients arrive here, added up in fp32.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype):
        self.model = model
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.copies: dict[Tensor, nn.Parameter] = {}
        if compute == torch.float32:
            return
        for master in self.parameters.values():
            copy = nn.Parameter(master.detach().to(compute), requires_grad=master.requires_grad)
            if master.requires_grad:
                copy.register_post_accumulate_grad_hook(_adder_to(master))
            self.copies[master] = copy
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = self.copies[parameter]  # one copy for parameters that are shared

    def accumulate(self, last: bool) -> None:
        """As `Sharded.accumulate`; on one process there is nothing to hold back."""

    def reduce(self) -> None:
        """As `Sharded.reduce`; there is nobody to add up with."""

    def release(self) -> None:
        """As `Sharded.release`; nothing was gathered."""

    @torch.no_grad()
    def changed(self) -> None:
        """To be called when parameters have changed: renews the copies."""
        if self.copies:
            torch._foreach_copy_([*map(local_of, self.copies.values())], [*map(local_of, self.copies)])


def _adder_to(master: Tensor) -> Callable[[Tensor], None]:
    def add(copy: Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient

    return add
