"""Which steps are left out: those whose loss or gradient norm is not finite, or far above what it has been of late.

The history is two rings on the device, so that nobody waits to judge a step, and part of the engine's state, so that a
run that goes on elsewhere judges as it would have. Steps that are left out do not enter it. The rule is OLMo's
SkipStepOptimizer's (OLMo et al. 2024, arXiv:2501.00656), but for the floor.

Shape suffixes: F figures (loss, gradient norm), W steps of the window.
"""

import torch
from torch import Tensor

FLOOR = 0.01
"""Least standard deviation, as a share of the mean: the noise of a figure that has stood still is no spike."""


class Spikes:
    """The judge of steps; every rank has the same figures, and so says the same.

    Args:
        strength: standard deviations above the mean from which on a loss or a norm is a spike; 0 judges only whether
            both are finite, and keeps no history.
        window: steps of the history; the first steps, until half of it is there, are only remembered.
        device: where the figures are.
    """

    def __init__(self, strength: float, window: int, device: torch.device):
        self.strength = strength
        self.history_FW = torch.zeros(2, window, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._slots_W = torch.arange(window, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where the step is to be left out, else 0.0; then its figures are remembered."""
        figures_F = torch.stack([loss, norm]).double()
        skipped = ~figures_F.isfinite().all()
        if not self.strength:
            return skipped.float()
        skipped = skipped | (figures_F > self._limits()).any()
        slot_W = self._slots_W == self.count % len(self._slots_W)
        self.history_FW.copy_(torch.where(slot_W & ~skipped, figures_F[:, None], self.history_FW))
        self.count += ~skipped
        return skipped.float()

    def _limits(self) -> Tensor:
        """Mean + strength x standard deviation; infinite while there are too few steps to tell."""
        window = len(self._slots_W)
        known_W = self._slots_W < self.count  # once the ring is full, all
        known = known_W.sum().clamp(min=1)
        mean_F1 = self.history_FW.sum(1, keepdim=True) / known
        square_F1 = ((self.history_FW - mean_F1).square() * known_W).sum(1, keepdim=True) / known
        deviation_F1 = torch.maximum(square_F1.sqrt(), FLOOR * mean_F1.abs())
        limits_F = (mean_F1 + self.strength * deviation_F1).squeeze(1)
        return torch.where(self.count >= max(2, window // 2), limits_F, torch.inf)

    def state(self) -> dict[str, Tensor]:
        """The history, where there is one."""
        if not self.strength:
            return {}
        return {"engine.spikes.history": self.history_FW, "engine.spikes.count": self.count}
