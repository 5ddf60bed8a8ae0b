"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), with the frequency scalings that published
Llama and Qwen configurations use.

Shape suffixes: B sequences, L tokens, H heads, D features of a head, E = D/2 rotated pairs (feature e with e + D/2,
the Hugging Face convention).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCALINGS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """How fast each pair of features turns with the position.

    Args:
        theta: base of the geometric series of wavelengths.
        scaling: "default"; "linear" divides all frequencies by `factor`; "llama3" divides the slow ones only
            (Dubey et al. 2024, arXiv:2407.21783, and its reference code).
        factor: by how much the context is stretched.
        low_frequency_factor: llama3: wavelengths above original_positions / this are divided by `factor`.
        high_frequency_factor: llama3: wavelengths below original_positions / this stay; between, both are blended.
        original_positions: llama3: longest context before stretching, in tokens.
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """frequency_E: radians per position of each pair, fp32."""
        exponent_E = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        frequency_E = 1.0 / self.theta**exponent_E
        if self.scaling == "linear":
            return frequency_E / self.factor
        if self.scaling == "llama3":
            turns_E = self.original_positions * frequency_E / (2 * math.pi)
            kept_E = (turns_E - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
            kept_E = kept_E.clamp(0, 1)
            return kept_E * frequency_E + (1 - kept_E) * frequency_E / self.factor
        return frequency_E

    def rotation(self, positions_BL: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos_BL1E and sin_BL1E of every position; angles are computed in fp32, then rounded to `dtype`."""
        angle_BL1E = positions_BL[:, :, None, None].float() * self.frequencies(head_dim, positions_BL.device)
        return angle_BL1E.cos().to(dtype), angle_BL1E.sin().to(dtype)


def rotate(x_BLHD: Tensor, cos_BL1E: Tensor, sin_BL1E: Tensor) -> Tensor:
    """Turn each pair of features by its angle."""
    first_BLHE, second_BLHE = x_BLHD.chunk(2, dim=-1)
    return torch.cat(
        [first_BLHE * cos_BL1E - second_BLHE * sin_BL1E, second_BLHE * cos_BL1E + first_BLHE * sin_BL1E], dim=-1
    )
