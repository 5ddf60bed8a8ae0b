"""Supervised fine-tuning: predict what the assistant says (Ouyang et al. 2022, arXiv:2203.02155).

Shape suffixes: B sequences, L tokens.
"""

from dataclasses import dataclass

from conf.registry import register
from train.objectives.clm import CausalLM


@register("objective", "sft")
@dataclass(frozen=True)
class SFT(CausalLM):
    """Cross-entropy over the assistant's tokens, in nats per token: every token of a step weighs the same, whichever
    conversation it is in. What is labelled is the data's affair (`data=chat`)."""
