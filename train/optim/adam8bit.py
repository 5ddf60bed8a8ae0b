"""AdamW whose moments take a byte each (Dettmers et al. 2022, arXiv:2110.02861): 2 bytes a weight in the place of 8.

Moments are kept as codes for 256 levels, more of them near 0, times one scale per block of 256 elements. A step widens
the codes of one parameter after the other to fp32, updates, and rounds. Embeddings, norms and biases keep fp32 moments
(section 2.3 there). A scale has the sign of the block's largest element, which so is a level itself: rounding again
what was widened changes nothing, and a checkpoint, which holds fp32 moments and no blocks, gives the same bits back.

Blocks lie within a rank's part of a parameter: other layouts round otherwise, so they agree as bf16 runs do.

Shape suffixes: X elements of this rank's part of a parameter, R blocks, K elements of a block, C codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import Problem
from conf.registry import register
from parallel.reduce import local_of
from train.optim.adamw import WithAdamW, adam_problems, adamw, sharded_as, split_by_decay

if TYPE_CHECKING:
    from train.config import RunConfig

BLOCK = 256
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Names, and whether they have a sign."""


@register("optim", "adam8bit")
@dataclass(frozen=True)
class Adam8bit:
    """AdamW with 8-bit moments for matrices.

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
    moment_bytes: ClassVar[float] = 2.0

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range."""
        return adam_problems(self)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters that train."""
        decayed, others = split_by_decay(model)
        return EightBit(list(decayed.values()), adamw(self, [], list(others.values()), self.lr), self)


class EightBit(WithAdamW):
    """8-bit moments for the matrices.

    Attributes:
        state: of a matrix, the codes and scales of its moments.
    """

    def __init__(self, parameters: list[nn.Parameter], adam: torch.optim.AdamW, options: Adam8bit):
        super().__init__(parameters, adam, options)
        self._wide: dict[Tensor, dict[str, Tensor]] = {}
        device = next(p.device for group in self.param_groups for p in group["params"])
        self._levels_C = {moment: levels(signed).to(device) for moment, signed in MOMENTS.items()}
        self._step = torch.compile(_step, dynamic=True) if device.type == "cuda" else _step

    @property
    def moments(self) -> Mapping[Tensor, dict[str, Tensor]]:
        """The state as AdamW has it, for a checkpoint: fp32 copies, which live until the next step. What is written
        into them counts after `loaded()`."""
        for parameter in self.param_groups[0]["params"]:
            if (state := self.state[parameter]) and parameter not in self._wide:
                self._wide[parameter] = {"step": state["step"]}
                for moment, levels_C in self._levels_C.items():
                    codes_X = state[moment]  # may be offloaded
                    wide_X = widened(codes_X, state[f"{moment}_scale"], levels_C.to(codes_X.device))
                    self._wide[parameter][moment] = sharded_as(parameter, wide_X.view_as(local_of(parameter)))
        return self.state | self._wide

    @torch.no_grad()
    def loaded(self) -> None:
        """Take over what was written into `moments`."""
        for parameter, wide in self._wide.items():
            state = self.state[parameter]
            for moment, levels_C in self._levels_C.items():
                wide_X = local_of(wide[moment]).reshape(-1)
                codes_X, scales_R = rounded(wide_X, levels_C.to(wide_X.device))
                state[moment].copy_(codes_X)
                state[f"{moment}_scale"].copy_(scales_R)
        self._wide.clear()

    def update(self, parameters: list[Tensor], group: dict[str, Any], scale: Tensor, skipped: Tensor) -> None:
        self._wide.clear()
        lr = torch.full((), group["lr"], device=scale.device)  # a tensor, so that a compiled step is compiled once
        for parameter in parameters:
            state = self.state[parameter] or self._begin(parameter)
            weight, gradient = local_of(parameter), local_of(parameter.grad)  # type: ignore[arg-type]
            state["step"] += 1 - skipped
            old = [weight.reshape(-1), *(state[key] for key in state if key != "step")]
            tables = list(self._levels_C.values())
            new = self._step(gradient.reshape(-1), state["step"], old, tables, lr, scale, self.options)
            weight.copy_(torch.where(skipped > 0, old[0], new[0]).view_as(weight))
            for kept, found in zip(old[1:], new[1:], strict=True):
                kept.copy_(torch.where(skipped > 0, kept, found))

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        zeros_X = torch.zeros_like(local_of(parameter), dtype=torch.float32).reshape(-1)
        for moment, levels_C in self._levels_C.items():
            state[moment], state[f"{moment}_scale"] = rounded(zeros_X, levels_C)
        return state


def _step(
    gradient_X: Tensor,
    step: Tensor,
    old: list[Tensor],
    tables: list[Tensor],
    lr: Tensor,
    scale: Tensor,
    options: Adam8bit,
) -> list[Tensor]:
    """New values of the five that have old ones: weight_X, codes_X and scales_R of the mean and of the mean square,
    which are rounded after they were used."""
    weight_X, mean_X, mean_scales_R, square_X, square_scales_R = old
    mean_levels_C, square_levels_C = tables
    gradient_X = gradient_X / scale
    mean_X = widened(mean_X, mean_scales_R, mean_levels_C).lerp(gradient_X, 1 - options.beta1)
    square_X = widened(square_X, square_scales_R, square_levels_C).lerp(gradient_X.square(), 1 - options.beta2)
    root_X = (square_X / (1 - options.beta2**step)).sqrt() + options.eps
    weight_X = weight_X * (1 - lr * options.weight_decay) - lr * mean_X / (1 - options.beta1**step) / root_X
    return [weight_X, *rounded(mean_X, mean_levels_C), *rounded(square_X, square_levels_C)]


def levels(signed: bool) -> Tensor:
    """levels_C: 0, 1, and between them seven decades, each with twice as many levels as the one below it (Dettmers
    2016, arXiv:1511.04561), and with a sign as many below 0."""
    decades = []
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([positive, ends, *([-positive] if signed else [])]).sort().values.float()


def rounded(values_X: Tensor, levels_C: Tensor) -> tuple[Tensor, Tensor]:
    """codes_X (uint8) of the nearest levels, and scales_R, the largest element of each block, with its sign."""
    blocks_RK = F.pad(values_X, (0, -len(values_X) % BLOCK)).view(-(-len(values_X) // BLOCK), BLOCK)
    scales_R1 = blocks_RK.gather(1, blocks_RK.abs().argmax(1, keepdim=True))
    shares_RK = blocks_RK / torch.where(scales_R1 == 0, 1.0, scales_R1)
    codes_RK = torch.bucketize(shares_RK, (levels_C[:-1] + levels_C[1:]) / 2, out_int32=True)
    return codes_RK.to(torch.uint8).view(-1)[: len(values_X)].clone(), scales_R1.squeeze(1)


def widened(codes_X: Tensor, scales_R: Tensor, levels_C: Tensor) -> Tensor:
    """values_X, fp32."""
    scales_X = scales_R[:, None].expand(-1, BLOCK).reshape(-1)[: len(codes_X)]
    return levels_C[codes_X.int()] * scales_X
