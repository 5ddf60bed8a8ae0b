"""Supervised fine-tuning: predict what the assistant says (Ouyang et al. 2022, arXiv:2203.02155)."""

from dataclasses import dataclass

from conf.registry import register
from train.objectives.base import CrossEntropy


@register("objective", "sft")
@dataclass(frozen=True)
class SFT(CrossEntropy):
    """Cross-entropy over the assistant's tokens, in nats per token, whichever conversation they are in. What is
    labelled is the data's affair (`data=chat`)."""
