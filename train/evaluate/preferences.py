"""How a model orders held-out preference pairs.

Shape suffixes: B sequences, P pairs (B = 2P, chosen first), L tokens, S all pairs of a set.
"""

import torch
from torch import Tensor

from data_pipeline.preference import PreferencePairs
from train.evaluate.load import Subject


def sequence_logprobs(subject: Subject, pairs: PreferencePairs, batch: int) -> Tensor:
    """logprobs_2S of the answers, chosen and rejected, in nats."""
    parts = []
    for indices in torch.arange(len(pairs)).split(batch):
        micro_batch = pairs.micro_batch(indices.tolist())
        parts.append(micro_batch.sum_over_labels(subject.logprobs(micro_batch)).view(2, -1))
    return torch.cat(parts, -1)


def preference_scores(logprobs_2S: Tensor, reference_2S: Tensor) -> dict[str, float]:
    """Mean margin of the log-ratios to the reference, chosen less rejected, in nats (DPO's margin at beta 1), and the
    share of pairs in which it is positive."""
    chosen_S, rejected_S = logprobs_2S - reference_2S
    margin_S = chosen_S - rejected_S
    return {
        "margin": float(margin_S.mean()),
        "accuracy": float((margin_S > 0).float().mean()),
        "n": len(margin_S),
    }
