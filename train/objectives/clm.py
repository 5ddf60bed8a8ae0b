"""Causal language modelling: predict the next token of the same document.

Shape suffixes: B sequences, L tokens.
"""

from dataclasses import dataclass

from conf.registry import register
from train.objectives.base import IGNORED, LossTerms, MicroBatch, Objective, Outputs


@register("objective", "clm")
@dataclass(frozen=True)
class CausalLM(Objective):
    """Cross-entropy over every labelled position, in nats per token."""

    def loss(self, outputs: Outputs, micro_batch: MicroBatch) -> LossTerms:
        return LossTerms(total=-outputs.logprobs_BL.sum(), weight=(micro_batch.labels_BL != IGNORED).sum())
