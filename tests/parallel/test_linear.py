"""Gradients of weights can wait, and are the same when they come."""

import torch
from torch import Tensor, nn

from parallel.linear import deferring, install, product


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_weights_have_their_gradients_once_the_tickets_are_cashed() -> None:
    plain, deferred = layers(), layers()
    install(deferred)
    x_BLN = torch.randn(2, 5, 4)
    one, other = x_BLN.clone().requires_grad_(), x_BLN.clone().requires_grad_()
    plain(one).square().sum().backward()
    with deferring() as tickets:
        loss = deferred(other).square().sum()
    loss.backward()
    assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    first, bias, second = gradients(deferred)
    assert first is None
    assert second is None
    assert bias is not None
    torch.autograd.backward(tickets)
    torch.testing.assert_close(gradients(deferred), gradients(plain))


def test_tickets_of_several_micro_batches_add_up_in_any_order() -> None:
    plain, deferred = layers(), layers()
    install(deferred)
    waiting = []
    for number in range(3):
        x_BN = torch.randn(2, 4, generator=torch.Generator().manual_seed(number)).requires_grad_()
        plain(x_BN).sum().backward()
        with deferring() as tickets:
            loss = deferred(x_BN).sum()
        loss.backward()
        waiting.append(tickets)
    for tickets in reversed(waiting):
        torch.autograd.backward(tickets)
    torch.testing.assert_close(gradients(deferred), gradients(plain))


def test_nothing_waits_where_nobody_asks_for_the_inputs_gradient() -> None:
    x_BN, weight_MN = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    with deferring() as tickets:
        product(x_BN, weight_MN).sum().backward()
        with torch.no_grad():
            product(x_BN.requires_grad_(), weight_MN)
    product(x_BN, weight_MN).sum().backward()
    assert tickets == []
    assert weight_MN.grad is not None
