"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conf.errors import Problem
from conf.registry import register
from parallel.reduce import by_mesh

if TYPE_CHECKING:
    from train.config import RunConfig


@register("optim", "adamw")
@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, in one fused kernel.

    Args:
        lr: base learning rate; the schedule multiplies it.
        beta1: decay of the mean of gradients, per step.
        beta2: decay of the mean of squared gradients, per step.
        eps: added to the root of the mean square.
        weight_decay: share of each weight removed per step, in units of the learning rate. Norms, biases and embeddings
            are not decayed.
    """

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range."""
        return adam_problems(self)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters that train."""
        decayed, others = split_by_decay(model)
        return adamw(self, list(decayed.values()), list(others.values()), self.lr)


def adamw(options: Any, decayed: list[nn.Parameter], others: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW in one fused kernel per group.

    Args:
        options: have beta1, beta2, eps and weight_decay.
        decayed, others: its parameters; only the first are decayed.
        lr: base learning rate.
    """
    groups: list[dict[str, Any]] = [
        *({"params": alike, "weight_decay": options.weight_decay} for alike in by_mesh(decayed)),
        *({"params": alike, "weight_decay": 0.0} for alike in by_mesh(others)),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True)


class WithAdamW(torch.optim.Optimizer):
    """Two optimizers in one: the first parameter group is updated in a way of its own, the others are those of `adam`.

    As fused optimizers of torch do, it divides gradients by `grad_scale` and leaves everything as it is where
    `found_inf` is 1; both are scalars on the device, set before `step`.

    Args:
        parameters: the first group; decayed by options.weight_decay.
        adam: the optimizer of all others.
        options: have lr and weight_decay.
    """

    _step_supports_amp_scaling = True

    def __init__(self, parameters: list[nn.Parameter], adam: torch.optim.AdamW, options: Any):
        super().__init__([{"params": parameters}], {"lr": options.lr, "weight_decay": options.weight_decay})
        self.adam = adam
        self.options = options
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.param_groups += adam.param_groups
        adam.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.adam.grad_scale, self.adam.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self.adam.step()
        parameters = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        if parameters:
            device = parameters[0].device
            scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
            skipped = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
            self.update(parameters, self.param_groups[0], scale, skipped)

    def update(self, parameters: list[Tensor], group: dict[str, Any], scale: Tensor, skipped: Tensor) -> None:
        """Update parameters of the first group.

        Args:
            parameters: those that have a gradient.
            group: its options; `lr` is this step's.
            scale: what gradients must be divided by.
            skipped: 1 where nothing may change, whatever the gradients are.
        """
        raise NotImplementedError


def sharded_as(like: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's part of a tensor that is sharded as `like` is."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def split_by_decay(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters that are decayed (matrices and stacks of them), and those that are not (norms, biases, embeddings and
    so a tied head), by name.

    Args:
        model: a whole one, a part of a pipeline, or a ModuleList of parts.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not name.endswith("bias")  # a stack of biases is none
            (decayed if matrix and id(parameter) not in embeddings else others)[name] = parameter
    return decayed, others


def adam_problems(options: Any) -> list[Problem]:
    """Values of lr, beta1, beta2, eps and weight_decay outside their range."""
    found = []
    if options.lr <= 0:
        found.append(Problem("optim.lr", options.lr, "must be above 0, for instance 3e-4"))
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(options, name) < 1:
            found.append(Problem(f"optim.{name}", getattr(options, name), "must be in [0, 1)"))
    if options.eps <= 0:
        found.append(Problem("optim.eps", options.eps, "must be above 0, for instance 1e-8"))
    if options.weight_decay < 0:
        found.append(Problem("optim.weight_decay", options.weight_decay, "must be at least 0"))
    return found
