"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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
        groups: list[dict[str, Any]] = [
            *({"params": alike, "weight_decay": self.weight_decay} for alike in by_mesh(decayed.values())),
            *({"params": alike, "weight_decay": 0.0} for alike in by_mesh(others.values())),
        ]
        return torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )


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
