"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

Hidden matrices, those of experts each by itself, are updated by Muon; embeddings, head, norms and biases by AdamW.
Update sizes follow Moonlight (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that one learning rate serves both.

Shape suffixes: X matrices of a stack, M rows, N columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from conf.errors import Problem
from conf.registry import register
from parallel.matrices import map_whole
from parallel.precision import PRECISIONS, has_native_bf16
from parallel.reduce import local_of
from train.optim.adamw import WithAdamW, adam_problems, adamw, sharded_as, split_by_decay

if TYPE_CHECKING:
    from train.config import RunConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; chosen by Jordan for the steepest slope at 0, at the price of singular values in 0.7 to 1.2."""

SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}


@register("optim", "muon")
@dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum for hidden matrices, AdamW for the rest.

    Args:
        lr: base learning rate of the matrices; the schedule multiplies it.
        momentum: decay of the mean of gradients, per step.
        scale: factor on each matrix's update: "match_rms_adamw" (0.2 sqrt(max(rows, columns)): the size of AdamW's
            updates, so its learning rates fit) or "original" (sqrt(max(1, rows / columns)); lr is then about 0.02).
        iterations: of Newton and Schulz.
        precision: of the iteration: "auto" (bf16 where the device has it natively), "bf16", "fp32".
        adam_lr: base learning rate of all other parameters.
        beta1: AdamW's decay of the mean of gradients, per step.
        beta2: AdamW's decay of the mean of squared gradients, per step.
        eps: AdamW's; added to the root of the mean square.
        weight_decay: share of each weight removed per step, in units of the learning rate. Norms, biases and embeddings
            are not decayed.
    """

    lr: float = 1e-3
    momentum: float = 0.95
    scale: str = "match_rms_adamw"
    iterations: int = 5
    precision: str = "auto"
    adam_lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    moment_bytes: ClassVar[float] = 4.0

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range."""
        found = adam_problems(self)
        if self.adam_lr <= 0:
            found.append(Problem("optim.adam_lr", self.adam_lr, "must be above 0, for instance 1e-3"))
        if not 0 <= self.momentum < 1:
            found.append(Problem("optim.momentum", self.momentum, "must be in [0, 1)"))
        if self.iterations < 1:
            found.append(Problem("optim.iterations", self.iterations, "must be at least 1; 5 is usual"))
        if self.scale not in SCALES:
            found.append(Problem("optim.scale", self.scale, f"one of {', '.join(SCALES)}"))
        if self.precision not in PRECISIONS:
            found.append(Problem("optim.precision", self.precision, f"one of {', '.join(PRECISIONS)}"))
        return found

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters that train; matrices inside `blocks`, of the model or of each part that is
        here, are Muon's."""
        blocks = [getattr(part, "blocks", None) for part in model.modules()]
        hidden = {id(p) for layers in blocks if isinstance(layers, nn.ModuleList) for p in layers.parameters()}
        decayed, others = split_by_decay(model)
        matrices = [p for p in decayed.values() if id(p) in hidden]
        rest = [p for p in decayed.values() if id(p) not in hidden]
        return MuonWithAdamW(matrices, adamw(self, rest, list(others.values()), self.adam_lr), self)


class MuonWithAdamW(WithAdamW):
    """Muon for the matrices."""

    def update(self, parameters: list[Tensor], group: dict[str, Any], scale: Tensor, skipped: Tensor) -> None:
        taken = 1 - skipped
        looking_ahead = []
        for matrix in parameters:
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            momentum = local_of(state["momentum_buffer"])
            gradient = local_of(matrix.grad)  # type: ignore[arg-type]
            # Where the step is skipped the gradient may be nan: the momentum takes its place, and so stays.
            gradient = torch.where(skipped > 0, momentum, gradient / scale)
            momentum.lerp_(gradient, 1 - self.options.momentum)
            looking_ahead.append(sharded_as(matrix, gradient.lerp_(momentum, self.options.momentum)))  # Nesterov's
        updates = map_whole(self._orthogonal, looking_ahead)
        for matrix, update in zip(parameters, updates, strict=True):
            rows, columns = matrix.shape[-2:]
            weight = local_of(matrix)
            weight.mul_(1 - group["lr"] * group["weight_decay"] * taken)
            weight.sub_(update * (group["lr"] * SCALES[self.options.scale](rows, columns) * taken))

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        auto = self.options.precision == "auto" and has_native_bf16(matrix.device)
        dtype = torch.bfloat16 if auto or self.options.precision == "bf16" else torch.float32
        return orthogonalise(matrix, self.options.iterations, dtype)


def orthogonalise(matrix: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """Nearly the nearest matrix with orthonormal rows or columns: U V' of the singular value decomposition U S V'.

    Newton-Schulz on singular values s in (0, 1]: s <- a s + b s^3 + c s^5, by matrix products only.

    Args:
        matrix: matrix_MN, or a stack_XMN of them; the result has its dtype.
        iterations: 5 bring singular values of 1e-2 and more into 0.7 to 1.2.
        dtype: of the products.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x_XMN = (matrix if wide else matrix.mT).to(dtype).reshape(-1, min(matrix.shape[-2:]), max(matrix.shape[-2:]))
    x_XMN = x_XMN / x_XMN.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest singular value is at most 1
    for _ in range(iterations):
        gram_XMM = x_XMN @ x_XMN.mT
        x_XMN = torch.baddbmm(x_XMN, torch.baddbmm(gram_XMM, gram_XMM, gram_XMM, beta=b, alpha=c), x_XMN, beta=a)
    return (x_XMN if wide else x_XMN.mT).reshape(matrix.shape).to(matrix.dtype)
