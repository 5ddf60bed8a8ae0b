"""Masked language modelling: say what was hidden, looking both ways (Devlin et al. 2019, arXiv:1810.04805).

Shape suffixes: B sequences, L tokens, V ids that are no special tokens.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from conf.errors import Problem
from conf.registry import register
from train.objectives.base import IGNORED, CrossEntropy, MicroBatch, keyed

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer

MASKED, RANDOM = 0.8, 0.1
"""Of the chosen positions, the share replaced by the mask token and by a random one; the rest stay as they are."""


@register("objective", "mlm")
@dataclass(frozen=True)
class MaskedLM(CrossEntropy):
    """Cross-entropy over the chosen positions, in nats per token. Special tokens and padding are never chosen.

    Args:
        rate: share of positions that are predicted; in (0, 1).
        mask_token: the special token that hides a position; the tokenizer must have it.
    """

    rate: float = 0.15
    mask_token: str = "<|mask|>"

    causal: ClassVar[bool] = False

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        return [] if 0 < self.rate < 1 else [Problem("objective.rate", self.rate, "between 0 and 1, for instance 0.15")]

    def prepare(self, micro_batch: MicroBatch, seed: int, tokenizer: "Tokenizer") -> MicroBatch:
        """Hide tokens; labels are the hidden ones, at their own positions."""
        mask = tokenizer.special(self.mask_token)
        ordinary_V = _ordinary(tokenizer.vocabulary, frozenset(tokenizer.special_ids))
        tokens_BL = micro_batch.tokens_BL.numpy().copy()
        labels_BL = np.full_like(tokens_BL, IGNORED)
        eligible_BL = np.isin(tokens_BL, ordinary_V) & (micro_batch.documents_BL.numpy() >= 0)
        for tokens_L, labels_L, eligible_L, sample in zip(
            tokens_BL, labels_BL, eligible_BL, micro_batch.samples_B.tolist(), strict=True
        ):
            random = keyed(seed, sample)
            chosen_L = eligible_L & (random.random(len(tokens_L)) < self.rate)
            fate_L = random.random(len(tokens_L))
            other_L = random.choice(ordinary_V, len(tokens_L))
            labels_L[chosen_L] = tokens_L[chosen_L]
            tokens_L[chosen_L & (fate_L < MASKED)] = mask
            replaced_L = chosen_L & (fate_L >= MASKED) & (fate_L < MASKED + RANDOM)
            tokens_L[replaced_L] = other_L[replaced_L]
        return replace(micro_batch, tokens_BL=torch.from_numpy(tokens_BL), labels_BL=torch.from_numpy(labels_BL))


@cache
def _ordinary(vocabulary: int, special_ids: frozenset[int]) -> np.ndarray:
    return np.setdiff1d(np.arange(vocabulary), list(special_ids))
