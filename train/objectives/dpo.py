"""Direct Preference Optimization: preferences without a reward model (Rafailov et al. 2023, arXiv:2305.18290).

Shape suffixes: B sequences, P pairs (B = 2P, chosen first), L tokens, S all pairs of a set.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conf.errors import Problem
from conf.registry import register
from data_pipeline.preference import PreferenceData
from train.objectives.base import Engine, LossTerms, MicroBatch, Objective, Outputs, PreferenceBatch, Samples

PAIRS_PER_PASS = 16
"""Pairs in one forward pass of the reference: fixed, so that the values do not depend on the number of ranks."""


@register("objective", "dpo")
@dataclass(frozen=True)
class DPO(Objective):
    """Raise the policy's log-ratio of chosen over rejected above the reference's (eq. 7). The reference is the model
    the run starts from.

    Args:
        beta: strength of the pull towards the reference, in nats of reward per nat of log-ratio; > 0.
        label_smoothing: assumed share of flipped preferences (conservative DPO); in [0, 0.5).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        problems = []
        if not self.beta > 0:
            problems.append(Problem("objective.beta", self.beta, "greater than 0, for instance 0.1"))
        if not 0 <= self.label_smoothing < 0.5:
            problems.append(Problem("objective.label_smoothing", self.label_smoothing, "in [0, 0.5)"))
        if not isinstance(config.data, PreferenceData):
            fix = "it learns from pairs of answers: set data=preference, or another objective"
            problems.append(Problem("objective", "dpo", fix))
        return problems

    def setup(self, engine: Engine, samples: Samples, directory: Path) -> "WithReference":
        """Attach the log-probabilities of the initial weights. They are computed once in the life of a run and kept in
        `directory`: after a restart the weights have moved."""
        file = directory / f"reference-{samples.fingerprint}.npy"
        reference_2S = torch.full((2, len(samples)), -torch.inf)
        if file.exists():
            reference_2S = torch.from_numpy(np.load(file))
        # Every rank learns what any of them has found: directories need not be shared.
        reference_2S = _merge(reference_2S, engine.device)
        if torch.isneginf(reference_2S).any():
            reference_2S = _merge(reference_logprobs(engine, samples), engine.device)
        if not file.exists():
            directory.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            with open(temporary, "wb") as stream:
                np.save(stream, reference_2S.numpy())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        return WithReference(samples, reference_2S)

    def loss(self, outputs: Outputs, micro_batch: MicroBatch) -> LossTerms:
        """Sum of the pair losses and the number of pairs. Rewards are beta times the log-ratio to the reference (eq. 5
        without the partition function, which cancels in the margin)."""
        assert isinstance(micro_batch, PreferenceBatch), "objective=dpo needs data=preference"
        logratio_B = micro_batch.sum_over_labels(outputs.logprobs_BL) - micro_batch.reference_logprobs_B
        chosen_P, rejected_P = (self.beta * logratio_B).split(micro_batch.pairs)
        margin_P = chosen_P - rejected_P
        loss_P = -(1 - self.label_smoothing) * F.logsigmoid(margin_P) - self.label_smoothing * F.logsigmoid(-margin_P)
        return LossTerms(
            total=loss_P.sum(),
            weight=micro_batch.pairs,
            metrics={
                "margin": margin_P.detach().sum(),
                "accuracy": (margin_P > 0).sum(),
                "chosen_reward": chosen_P.detach().sum(),
                "rejected_reward": rejected_P.detach().sum(),
            },
        )

    def sequence_weights(self, micro_batch: MicroBatch) -> Tensor:
        """Half a pair each."""
        return torch.full_like(micro_batch.samples_B, 0.5, dtype=torch.float32)


class WithReference:
    """Preference samples that carry the reference model's log-probabilities.

    Args:
        samples: pairs without them.
        reference_2S: chosen and rejected log-probability of each pair, in nats.
    """

    def __init__(self, samples: Samples, reference_2S: Tensor):
        self._samples = samples
        self._reference_2S = reference_2S
        self.fingerprint = samples.fingerprint

    def __len__(self) -> int:
        return len(self._samples)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        batch = self._samples.micro_batch(indices)
        assert isinstance(batch, PreferenceBatch)
        return replace(batch, reference_logprobs_B=self._reference_2S[:, list(indices)].flatten())


def reference_logprobs(engine: Engine, samples: Samples) -> Tensor:
    """reference_2S of the engine's present weights: this rank's share of the pairs, -inf elsewhere.

    Data-parallel ranks take turns over batches of fixed content. Calls are collective, so all make as many.
    """
    reference_2S = torch.full((2, len(samples)), -torch.inf)
    batches = list(torch.arange(len(samples)).split(PAIRS_PER_PASS))
    for first in range(0, len(batches), engine.dp_size):
        mine = first + engine.dp_rank
        indices = batches[min(mine, len(batches) - 1)]
        batch = samples.micro_batch(indices.tolist())
        sums_B = batch.sum_over_labels(engine.logprobs(batch.to(engine.device)).cpu())
        reference_2S[:, indices] = sums_B.view(2, -1)
    return reference_2S


def _merge(values: Tensor, device: torch.device) -> Tensor:
    """Elementwise maximum over all ranks: the value where any rank has one, -inf where none has."""
    if not dist.is_initialized():
        return values
    shared = values.to(device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.cpu()
