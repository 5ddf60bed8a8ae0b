"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467): y = w x / sqrt(mean(x^2) + eps).

Shape suffixes: ... any leading dimensions, N features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalise the last dimension.

    Args:
        width: its size.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_N: Tensor) -> Tensor:
        if x_N.device.type == "cpu" and x_N.element_size() == 2:
            return _NarrowRMSNorm.apply(x_N, self.weight, self.eps)
        return F.rms_norm(x_N, self.weight.shape, self.weight, self.eps)


class _NarrowRMSNorm(torch.autograd.Function):
    """On a CPU in 16 bits, where PyTorch has no kernel and composes it of a dozen fp32 passes: the mean square in fp32,
    the passes over x in its own width. With n = x r, r = 1 / sqrt(mean(x^2) + eps) and h = w g:

    dx = r (h - n mean(h n)),   dw = sum over rows of g n
    """

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x_N.dtype, torch.float32)
        square = torch.linalg.vector_norm(x_N, dim=-1, keepdim=True, dtype=wide).square()
        r = (square / x_N.shape[-1] + eps).rsqrt()
        n_N = (x_N.to(wide) * r).to(x_N.dtype)
        ctx.save_for_backward(n_N, weight_N, r)
        return n_N * weight_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        n_N, weight_N, r = ctx.saved_tensors
        grad_weight_N = (grad_N * n_N).flatten(0, -2).sum(0)
        h_N = grad_N * weight_N
        mean = torch.linalg.vecdot(h_N, n_N)[..., None] / n_N.shape[-1]
        grad_x_N = (torch.addcmul(h_N, n_N, mean, value=-1).to(r.dtype) * r).to(n_N.dtype)
        return grad_x_N, grad_weight_N, None
