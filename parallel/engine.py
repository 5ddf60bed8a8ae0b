"""The engine contract: whoever owns the parallel model and its optimizer looks like this to the trainer.

Shape suffixes: B sequences, L tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """What an objective says of one micro-batch: sums, never means. The engine divides, once, by the weight summed
    over the micro-batches and data-parallel ranks of the whole step.

    Args:
        total: sum of the losses, fp32 scalar with a gradient.
        weight: how many terms were summed (labels, pairs).
        metrics: further sums over the same terms.
    """

    total: Tensor
    weight: Tensor | int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outputs:
    """What a model answers.

    Args:
        logprobs_BL: fp32 log-probability of each label, in nats; 0 where the label is ignored.
    """

    logprobs_BL: Tensor


@dataclass(frozen=True)
class StepResult:
    """Figures of one step over all ranks, as device scalars: read them a step late, so that nobody waits.

    Args:
        loss: the objective's mean over all terms of the step.
        weight: the number of terms.
        grad_norm: global gradient norm before clipping; nan for an evaluation.
        skipped: 1 where the update was left out because loss or norm was not finite, or a spike.
        metrics: the objective's other means; where the gradients were computed twice, also `differing`: on how many
            ranks they were not the same.
    """

    loss: Tensor
    weight: Tensor
    grad_norm: Tensor
    skipped: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How a run is computed, whichever engine does it and wherever its tensors are.

    Args:
        precision: "auto", "bf16", "fp32" or "fp8": of forward and backward; masters, moments and sums are fp32 always.
        compile: compile each block.
        clip: largest global gradient norm; 0 does not clip.
        ema: decay per step of the average of the weights; 0 keeps none.
        deterministic: allow deterministic kernels only.
        seed: keys dropout, together with step and sample.
        skip_spikes: leave out a step whose loss or gradient norm is so many standard deviations above the mean of the
            last `spike_window` steps; 0 leaves out only those that are not finite.
        spike_window: steps.
        repeat_every: steps between those whose gradients are computed twice, and that are left out where the two differ
            in a bit; 0 never.
    """

    precision: str = "auto"
    compile: bool = False
    clip: float = 1.0
    ema: float = 0.0
    deterministic: bool = False
    seed: int = 0
    skip_spikes: float = 0.0
    spike_window: int = 128
    repeat_every: int = 0


def nothing() -> None:
    """What an engine does before an update until it is told otherwise."""


class Engine(Protocol):
    """Owns the model and the optimizer; every rank calls every method together.

    Attributes:
        device: where this rank computes.
        dp_rank, dp_size: which part of each global batch is this rank's.
        before_update: called in every step once the gradients are there, before anything of the state changes.
    """

    device: torch.device
    dp_rank: int
    dp_size: int
    before_update: Callable[[], None]

    def train_step(self, micro_batches: Sequence[Any], objective: Any, learning_rate_factor: float) -> StepResult:
        """Forward, backward, clip, update. All ranks update or all skip.

        Args:
            micro_batches: this data-parallel rank's share of the global batch.
            objective: anything with `causal: bool`, `loss(outputs, micro_batch) -> LossTerms` and, where the model has
                experts, `sequence_weights(micro_batch) -> weights_B`, which add up to the loss's weight.
            learning_rate_factor: the schedule's value, multiplied into each parameter group's base rate.
        """
        ...

    def evaluate(self, micro_batches: Sequence[Any], objective: Any, ema: bool = False) -> StepResult:
        """The objective's means over the given micro-batches of all ranks, without gradients or dropout."""
        ...

    def logprobs(self, micro_batch: Any) -> Tensor:
        """logprobs_BL of this rank's micro-batch, without gradients or dropout."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Model, optimizer and EMA tensors (DTensors where sharded) under layout-free names: `model.<parameter>`,
        `optimizer.<parameter>.<moment>`, `ema.<parameter>`, with Hugging Face parameter names. The tensors are the
        live ones: a checkpoint reads them, or is loaded into them in place, followed by `loaded()`."""
        ...

    def loaded(self) -> None:
        """To be called after tensors of `state()` were overwritten in place."""
        ...

    def tensors(self, ema: bool = False) -> dict[str, Tensor]:
        """This rank's fp32 weights by parameter name: live, sharded, and under pipeline parallelism some only."""
        ...

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Full fp32 weights on the CPU of rank 0, by parameter name; empty on the other ranks."""
        ...
