"""What a rank computes of a micro-batch: all of it, or the tokens that context parallelism leaves to it.

Shape suffixes: B sequences, L tokens, l tokens of this rank, N features.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.context import gather_own, indices, take
from parallel.layout import Layout
from parallel.mesh import Mesh

IGNORED, PADDING = -100, -1


@dataclass(frozen=True)
class View:
    """One micro-batch on this rank.

    Args:
        batch: as the objective sees it, on the device.
        tokens_Bl, positions_Bl, documents_Bl, labels_Bl: this rank's tokens.
        length: tokens of a sequence before padding.
        group: the ranks that have the other tokens; None where there are none.
        context: further arguments of the model's forward.
    """

    batch: Any
    tokens_Bl: Tensor
    positions_Bl: Tensor
    documents_Bl: Tensor
    labels_Bl: Tensor
    length: int
    group: dist.ProcessGroup | None = None
    context: dict[str, Any] = field(default_factory=dict)

    def through(self, model: nn.Module, hidden_BlN: Tensor | None) -> Tensor:
        """A stage's answer: log-probabilities of this rank's labels, or hidden states."""
        inputs = self.tokens_Bl if hidden_BlN is None else hidden_BlN
        return model(inputs, self.positions_Bl, self.documents_Bl, self.labels_Bl, **self.context)

    def whole(self, logprobs_Bl: Tensor) -> Tensor:
        """logprobs_BL of the whole sequences, without padding."""
        logprobs_BL = logprobs_Bl if self.group is None else gather_own(logprobs_Bl, self.group)
        return logprobs_BL if logprobs_BL.shape[1] == self.length else logprobs_BL[:, : self.length]


def view_of(batch: Any, layout: Layout, mesh: Mesh, **context: Any) -> View:
    """Pad the sequences to a length that all ranks can share, and take this rank's tokens."""
    length = batch.tokens_BL.shape[1]
    missing = -length % layout.sequence_multiple
    tokens_BL = _padded(batch.tokens_BL, missing, 0)
    positions_BL = _padded(batch.positions_BL, missing, 0)
    documents_BL = _padded(batch.documents_BL, missing, PADDING)
    labels_BL = _padded(batch.labels_BL, missing, IGNORED)
    if layout.cp == 1:
        return View(batch, tokens_BL, positions_BL, documents_BL, labels_BL, length, context=context)
    index_l = indices(tokens_BL.shape[1], layout.cp, mesh.cp_rank, tokens_BL.device)
    columns = (tokens_BL, positions_BL, documents_BL, labels_BL)
    tokens_Bl, positions_Bl, documents_Bl, labels_Bl = (take(t, layout.cp, mesh.cp_rank) for t in columns)
    context |= {"index_L": index_l, "key_documents_BS": documents_BL}
    return View(batch, tokens_Bl, positions_Bl, documents_Bl, labels_Bl, length, mesh.context_group, context)


def _padded(values_BL: Tensor, missing: int, value: int) -> Tensor:
    return F.pad(values_BL, (0, missing), value=value) if missing else values_BL
