"""AdamW through the kernel of NVIDIA apex's FusedAdam: one launch for many tensors (https://github.com/NVIDIA/apex)."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from conf.errors import LongrunError, Problem
from conf.registry import register
from parallel.reduce import local_of
from train.optim.adamw import adam_problems, split_by_decay

if TYPE_CHECKING:
    from train.config import RunConfig

DECOUPLED, CORRECT_BIAS = 1, 1
"""What the kernel is to do: AdamW, with bias correction."""


class ApexError(LongrunError):
    """NVIDIA's apex is not here, or not as it is needed."""


@register("optim", "adamw_apex")
@dataclass(frozen=True)
class AdamWApex:
    """AdamW in apex's fused kernel; on CUDA, where NVIDIA's apex is installed.

    Args:
        lr: base learning rate; the schedule multiplies it.
        beta1: decay of the mean of gradients, per step.
        beta2: decay of the mean of squared gradients, per step.
        eps: added to the root of the mean square.
        weight_decay: share of each weight removed per step, in units of the learning rate. Norms, biases and embeddings
            are not decayed.
    """

    continues: ClassVar[str] = "adamw"
    """Its runs go on with this option's, and the other way round."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range; an apex that is missing here, unless the run is only looked at here."""
        found = adam_problems(self)
        if not config.dry_run:
            try:
                kernel()
            except ApexError as error:
                found.append(Problem("optim", "adamw_apex", str(error)))
        return found

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters that train.

        Raises:
            ApexError: see `kernel`.
        """
        decayed, others = split_by_decay(model)
        groups = [
            {"params": list(decayed.values()), "weight_decay": self.weight_decay},
            {"params": list(others.values()), "weight_decay": 0.0},
        ]
        return FusedAdamW(groups, self, kernel())


class FusedAdamW(torch.optim.Optimizer):
    """apex's FusedAdam, but for DTensors, with its steps counted in the state, and with torch's protocol for scaling:
    it divides gradients by `grad_scale` and leaves everything as it is where `found_inf` is 1.

    The state has the names and types of torch's AdamW, so each goes on from the other's checkpoint.

    Args:
        groups: parameter groups with their weight_decay.
        options: the rest.
        update: the kernel, see `kernel`.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict[str, Any]], options: AdamWApex, update: Callable[..., None]):
        super().__init__(groups, {"lr": options.lr})
        self.options = options
        self._kernel = update
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        device = parameters[0].device
        scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        skipped = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.zeros((), device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1 - skipped)
        parameters = [p for p in parameters if local_of(p).numel()]  # an empty part would hide those before it
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        options = self.options
        self._kernel(
            skipped.int().view(1),
            [
                [local_of(parameter.grad) for parameter in parameters],  # type: ignore[arg-type]
                [local_of(parameter) for parameter in parameters],
                [local_of(state["exp_avg"]) for state in states],
                [local_of(state["exp_avg_sq"]) for state in states],
            ],
            torch.full((1,), group["lr"], device=device),
            options.beta1,
            options.beta2,
            options.eps,
            states[0]["step"].int().view(1),
            DECOUPLED,
            CORRECT_BIAS,
            group["weight_decay"],
            scale.reciprocal().view(1),
        )


def kernel() -> Callable[..., None]:
    """FusedAdam's kernel, in the form that reads rate, step, scale and whether to do anything on the device.

    Raises:
        ApexError: apex is missing, was built without its extensions, is another package of this name, or there is no
            CUDA device.
    """
    try:
        apex = importlib.import_module("apex")
    except ImportError as error:
        raise ApexError(
            "NVIDIA's apex is not installed. Build it from https://github.com/NVIDIA/apex with its C++ and CUDA "
            "extensions (`pip install apex` brings an unrelated package), or use optim=adamw, which is fused too."
        ) from error
    try:
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    except ImportError as error:
        raise ApexError(
            f"the package apex at {getattr(apex, '__file__', None) or apex.__path__} is not NVIDIA's: PyPI has an "
            "unrelated one of this name. Uninstall it and build https://github.com/NVIDIA/apex, or use optim=adamw."
        ) from error
    try:
        extension = importlib.import_module("amp_C")
    except ImportError as error:
        raise ApexError(
            "NVIDIA's apex was built without its C++ and CUDA extensions (module amp_C). Build it again with them (see "
            "its README), or use optim=adamw."
        ) from error
    if not torch.cuda.is_available():
        raise ApexError("apex's kernels need a CUDA device. Use optim=adamw, which runs everywhere.")
    return lambda *arguments: applier(extension.multi_tensor_adam_capturable, *arguments)
