"""The gated feed-forward (SwiGLU: Shazeer 2020, arXiv:2002.05202).

Shape suffixes: B sequences, L tokens, N model width.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from train.models.transformer import Context


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Args:
        hidden: width of the residual stream, in features.
        intermediate: width in between.
        bias: of all three projections.
    """

    def __init__(self, hidden: int, intermediate: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x_BLN: Tensor, context: "Context") -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLN)) * self.up_proj(x_BLN))
