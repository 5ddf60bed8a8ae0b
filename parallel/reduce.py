"""Figures of a step, summed over micro-batches and ranks with one collective and without waiting for the device."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.engine import LossTerms

P = TypeVar("P", bound=Tensor)


class Sums:
    """Running sums of an objective's terms. fp64: a weight may be more tokens than fp32 can count."""

    def __init__(self, device: torch.device):
        self.device = device
        self.terms: dict[str, Tensor] = {}

    def add(self, terms: LossTerms, counts: bool = True) -> None:
        """Add one micro-batch; as nothing, where another rank answers for the same one."""
        for name, value in {"total": terms.total, "weight": terms.weight, **_prefixed(terms.metrics)}.items():
            value = torch.as_tensor(value, device=self.device).detach().double() * counts
            self.terms[name] = self.terms[name] + value if name in self.terms else value

    def expect(self, names: Sequence[str]) -> None:
        """Take part in the sums of terms that only other ranks have."""
        for name in names:
            self.terms.setdefault(name, torch.zeros((), dtype=torch.float64, device=self.device))

    def over_ranks(self, **more: Tensor) -> dict[str, Tensor]:
        """The sums over all ranks, and those of further scalars; every rank gets the same bits."""
        local = self.terms | more
        names = sorted(local)
        sums = torch.stack([local[name].double() for name in names])
        dist.all_reduce(sums)
        return dict(zip(names, sums.unbind(), strict=True))


def means(sums: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics: sums over the weight."""
    weight = sums["weight"]
    metrics = {name.removeprefix("metric."): sums[name] / weight for name in sums if name.startswith("metric.")}
    return (sums["total"] / weight).float(), {name: value.float() for name, value in metrics.items()}


def _prefixed(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"metric.{name}": value for name, value in metrics.items()}


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; it shares the tensor's memory."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_mesh(parameters: Iterable[P]) -> list[list[P]]:
    """Parameters in groups that live on the same mesh, or on none: an optimizer's kernel takes one kind at a time. At
    least one group, if empty."""
    groups: dict[Any, list[P]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values()) or [[]]


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """Sum of the squares of this rank's parts, in fp64."""
    return torch.stack(torch._foreach_norm([local_of(g) for g in gradients])).double().square().sum()
