"""Products with weights whose gradients can wait (zero-bubble pipelines: Qi et al. 2024, arXiv:2401.10241).

The gradient of a linear layer's input is needed at once by whoever comes before; that of its weight by nobody until the
optimizer. Inside `deferring` each product is recorded as two nodes: one that passes the input's gradient on and keeps
what the weight's needs, and a ticket, whose own backward pass computes the weight's. All else of autograd (hooks,
accumulation, FSDP2) sees an ordinary gradient, later.

Shape suffixes: ... any leading dimensions, M output features, N input features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_tickets: list[Tensor] | None = None


@contextmanager
def deferring() -> Iterator[list[Tensor]]:
    """Products inside leave tickets: `torch.autograd.backward(tickets)`, after the backward pass, brings the gradients
    of their weights."""
    global _tickets
    before, _tickets = _tickets, []
    try:
        yield _tickets
    finally:
        _tickets = before


def is_deferring() -> bool:
    return _tickets is not None


def here(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter; differentiable."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def product(x_N: Tensor, weight_MN: Tensor) -> Tensor:
    """x W^T. Nothing is deferred where nobody waits for the input's gradient."""
    if _tickets is None or not (torch.is_grad_enabled() and weight_MN.requires_grad and x_N.requires_grad):
        return F.linear(x_N, weight_MN)
    held: list[Tensor] = []
    _tickets.append(_Ticket.apply(weight_MN, held))
    return _Product.apply(x_N, weight_MN.detach(), held)


def install(model: nn.Module) -> None:
    """Let the linear layers of a model defer, those that have no forward of their own yet."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and "forward" not in vars(module):
            module.forward = _Forward(module)  # type: ignore[method-assign, assignment]


class _Forward:
    def __init__(self, module: nn.Linear):
        self.module = module

    def __call__(self, x_N: Tensor) -> Tensor:
        y_M = product(x_N, here(self.module.weight))
        return y_M if self.module.bias is None else y_M + self.module.bias


class _Product(torch.autograd.Function):
    """The input's gradient; what the weight's needs is put into `held`."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, weight_MN: Tensor, held: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x_N, weight_MN)
        ctx.held = held
        return F.linear(x_N, weight_MN)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x_N, weight_MN = ctx.saved_tensors
        ctx.held += [x_N, grad_M]
        return grad_M @ weight_MN, None, None


class _Ticket(torch.autograd.Function):
    """The weight's gradient, from what `_Product` kept. Its own incoming gradient is 1."""

    @staticmethod
    def forward(ctx: Any, weight_MN: Tensor, held: list[Tensor]) -> Tensor:
        ctx.held = held
        return weight_MN.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x_N, grad_M = ctx.held
        ctx.held.clear()
        return grad_M.flatten(0, -2).t() @ x_N.flatten(0, -2), None
