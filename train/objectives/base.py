"""What every objective shares: it turns log-probabilities into a sum and a weight.

Shape suffixes: B sequences, L tokens.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from data_pipeline.batch import IGNORED, MicroBatch, PreferenceBatch, Samples
from parallel.engine import Engine, LossTerms, Outputs

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer

__all__ = [
    "IGNORED",
    "CrossEntropy",
    "Engine",
    "LossTerms",
    "MicroBatch",
    "Objective",
    "Outputs",
    "PreferenceBatch",
    "Samples",
    "keyed",
]


class Objective:
    """A loss, and what must be done to a micro-batch before it can be computed.

    Subclasses are frozen dataclasses registered with `@register("objective", name)`; an objective never knows that it
    is distributed.
    """

    causal: ClassVar[bool] = True
    """Whether positions attend only to earlier ones."""

    def setup(self, engine: Engine, samples: Samples, directory: Path) -> Samples:
        """Called once with the initial weights, before the first step, by all ranks; what is stored in `directory`
        is found again after a restart. Returns the samples to train on."""
        return samples

    def prepare(self, micro_batch: MicroBatch, seed: int, tokenizer: "Tokenizer") -> MicroBatch:
        """The micro-batch as the model shall see it (masked, rearranged). Randomness is keyed by
        (seed, micro_batch.samples_B), never by rank."""
        return micro_batch

    def loss(self, outputs: Outputs, micro_batch: MicroBatch) -> LossTerms:
        """Sum of the losses of one micro-batch and the number of terms."""
        raise NotImplementedError

    def sequence_weights(self, micro_batch: MicroBatch) -> Tensor:
        """How much of the loss's weight each sequence stands for, fp32: what a model adds of its own (the balance of
        experts) is weighted so. As many as it has labels."""
        return (micro_batch.labels_BL != IGNORED).sum(-1).float()


class CrossEntropy(Objective):
    """Minus the log-probability of every label, in nats per token: each token of a step weighs the same."""

    def loss(self, outputs: Outputs, micro_batch: MicroBatch) -> LossTerms:
        return LossTerms(total=-outputs.logprobs_BL.sum(), weight=(micro_batch.labels_BL != IGNORED).sum())


def keyed(seed: int, sample: int) -> np.random.Generator:
    """Random numbers that depend on the run's seed and the sample alone (Philox, Salmon et al. 2011): the same on
    whichever rank, and in whichever micro-batch, the sample is."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, sample], dtype=np.uint64)))
