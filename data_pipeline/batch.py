"""Micro-batches: what a model is given.

Shape suffixes: B sequences, P pairs (B = 2P, chosen first), L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """Token sequences and what is to be predicted from them.

    Args:
        tokens_BL: token ids, int64.
        labels_BL: the token each position predicts (already shifted), int64; -100 where nothing is predicted.
        positions_BL: position within the document, int64; restarts at 0 with every document.
        documents_BL: document number within the sequence, int64; tokens attend only to their own document.
            Padding is -1.
        samples_B: position of the sample in the run (the k of sample k), int64: keys dropout and masking.
    """

    tokens_BL: Tensor
    labels_BL: Tensor
    positions_BL: Tensor
    documents_BL: Tensor
    samples_B: Tensor

    def to(self, device: torch.device) -> Self:
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return replace(self, **moved)

    def sum_over_labels(self, values_BL: Tensor) -> Tensor:
        """values_B: the sum over the positions that carry a label, in fp32."""
        return values_BL.float().masked_fill(self.labels_BL == IGNORED, 0).sum(-1)


@dataclass(frozen=True)
class PreferenceBatch(MicroBatch):
    """P pairs as 2P sequences: the chosen ones first, then the rejected ones in the same order.

    Args:
        reference_logprobs_B: log-probability of each sequence's labels under the reference model, fp32, in nats.
    """

    reference_logprobs_B: Tensor

    @property
    def pairs(self) -> int:
        return self.tokens_BL.shape[0] // 2


@dataclass(frozen=True)
class Span:
    """Part of a sample: tokens of one document that stand together in it.

    Args:
        source: where the document is: the stem of a shard, or a file of records.
        document: its number there, from 0.
        begin: the first of its tokens that is read, from 0.
        end: the first that is not; it is predicted where the document has it.
    """

    source: str
    document: int
    begin: int
    end: int


class Samples(Protocol):
    """A finite, indexable set of samples: text windows, packed conversations, preference pairs."""

    fingerprint: str

    def __len__(self) -> int: ...

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The samples with these indices (0 <= index < len), as one micro-batch; `samples_B` holds the indices."""
        ...


class Texts(Samples, Protocol):
    """Samples that tell which documents they are made of."""

    def spans(self, index: int) -> list[Span]:
        """What a sample holds, in order."""
        ...
