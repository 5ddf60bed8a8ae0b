"""Causal language modelling: predict the next token of the same document."""

from dataclasses import dataclass

from conf.registry import register
from train.objectives.base import CrossEntropy


@register("objective", "clm")
@dataclass(frozen=True)
class CausalLM(CrossEntropy):
    """Cross-entropy over every labelled position, in nats per token."""
