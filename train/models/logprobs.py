"""Log-probabilities of labels, fused with the output head so that no B x L x V tensor in fp32 ever exists.

For a labelled row t with hidden state h_t, logits z_t = W h_t and label y_t:

    logprob_t = z_t[y_t] - logsumexp(z_t)
    residual_t = onehot(y_t) - softmax(z_t)          d logprob_t / d z_t
    dh_t = g_t residual_t W,   dW = sum_t residual_t (g_t h_t)^T

where g_t, the gradient that arrives for t, is known in the backward pass only. It scales rows, so it can be applied to
the narrow side of both products; the wide residual is formed once, in the forward pass, while its logits are in the
processor's cache. In 16-bit compute it is kept, as wide as the logits any 16-bit model would keep, up to `KEPT_BYTES`;
beyond that, and in fp32, it is computed again, chunk by chunk (one more product of four).

Where the rows of W are shared among ranks (Shoeybi et al. 2019, arXiv:1909.08053, section 3), no logits travel. Each
rank finds the logsumexp over its own rows and, on the rank that has it, the label's logit; ranks exchange these two
numbers per row, once. A softmax over a rank's rows times exp(its logsumexp - that of all) is its part of the whole
softmax. The backward pass needs no exchange: dW is whole, dh is this rank's part of a sum.

Shape suffixes: B sequences, L tokens, T labelled rows, C rows of a chunk, N model width, V vocabulary (of this rank),
R ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import all_gather

IGNORED = -100
KEPT_BYTES = 2 * 1024**3
"""Most bytes of 16-bit residuals kept from the forward to the backward pass, per call."""
ROUND_ROWS_TO = 128
"""Labelled rows are computed in multiples of this many."""


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the output matrix this rank has.

    Args:
        first: token id of its first row.
        group: the ranks that share the matrix; each may have another number of rows, or none.
    """

    first: int
    group: dist.ProcessGroup

    def whole(self, logits_BLV: Tensor, vocabulary: int) -> Tensor:
        """The logits of all rows from those of this rank's, on every rank; without gradients, for decoding."""
        shape = (*logits_BLV.shape[:-1], vocabulary)
        whole_BLV = logits_BLV.new_zeros(shape, dtype=torch.promote_types(logits_BLV.dtype, torch.float32))
        whole_BLV[..., self.first : self.first + logits_BLV.shape[-1]] = logits_BLV.detach()
        dist.all_reduce(whole_BLV, group=self.group)
        return whole_BLV


def logprobs(hidden_BLN: Tensor, head_VN: Tensor, labels_BL: Tensor, shard: VocabularyShard | None = None) -> Tensor:
    """logprobs_BL: the log-probability of each label in nats, fp32 (fp64 for fp64); 0 where the label is -100.

    On CPU, rows without a label are not computed at all. Elsewhere they are, and masked: counting them would make the
    host wait for the device.

    Args:
        hidden_BLN: hidden states, after the last norm.
        head_VN: output matrix, in the same dtype.
        labels_BL: int64 token ids, or -100.
        shard: None where head_VN is the whole matrix. Else the values are those of the whole, on all ranks of the
            group, which pass the same hidden states and labels; the gradient of the hidden states is a rank's part of
            the sum over the group.
    """
    hidden_TN, labels_T = hidden_BLN.flatten(0, -2), labels_BL.flatten()
    keep = torch.is_grad_enabled()
    ignored_T = labels_T == IGNORED
    if _host_may_look(labels_T) and bool(ignored_T.any()):
        rows_T = (~ignored_T).nonzero().flatten()
        labelled = rows_T.shape[0]
        # A CPU's matrix kernels are built and cached by shape: a count that differs with every batch would build new
        # ones all along. A few unlabelled rows round it up; nothing reads what they answer.
        rows_T = torch.cat([rows_T, ignored_T.nonzero().flatten()[: -labelled % ROUND_ROWS_TO]])
        found_T = _LabelLogprobs.apply(hidden_TN[rows_T], head_VN, labels_T[rows_T].clamp(min=0), keep, shard)
        logprobs_T = found_T.new_zeros(labels_T.shape).index_put((rows_T[:labelled],), found_T[:labelled])
    else:
        found_T = _LabelLogprobs.apply(hidden_TN, head_VN, labels_T.clamp(min=0), keep, shard)
        logprobs_T = found_T.masked_fill(ignored_T, 0.0)
    # No view: FSDP hooks onto what a model returns, and an in-place operation on a view would lose the hook.
    return logprobs_T.view(labels_BL.shape).clone()


def _host_may_look(tensor: Tensor) -> bool:
    """Whether reading a value of it waits for nobody."""
    return tensor.device.type == "cpu"


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Chunks whose fp32 logits fit a CPU's last-level cache, or are large enough to fill a GPU; none of no logits."""
    elements = 2**22 if device.type == "cpu" else 2**27
    size = max(1, elements // max(1, vocabulary))
    return (slice(start, min(start + size, rows)) for start in range(0, rows if vocabulary else 0, size))


def _columns(labels_T: Tensor, vocabulary: int, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """column_T1: the label's row of this rank's matrix, any where it has none; here_T1: whether it has one."""
    labels_T1 = labels_T[:, None]
    if shard is None:
        return labels_T1, torch.ones_like(labels_T1, dtype=torch.bool)
    labels_T1 = labels_T1 - shard.first
    return labels_T1.clamp(0, vocabulary - 1), (labels_T1 >= 0) & (labels_T1 < vocabulary)


def _residual(hidden_CN: Tensor, head_VN: Tensor, column_C1: Tensor, here_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the rows of head_VN alone: the labels' logit_C (0 where they have no row), logsumexp_C and residual_CV; at
    least fp32."""
    logits_CV = F.linear(hidden_CN, head_VN)
    exact = torch.promote_types(logits_CV.dtype, torch.float32)
    probabilities_CV = torch.softmax(logits_CV, dim=-1, dtype=exact)
    # logsumexp = max - log softmax(max): softmax at the maximum is at least 1/V, so its logarithm is exact enough,
    # which that of the label's own probability, perhaps underflown, is not.
    logsumexp_C = logits_CV.amax(-1).to(exact) - probabilities_CV.amax(-1).log()
    logit_C = logits_CV.gather(-1, column_C1).to(exact).where(here_C1, 0.0).squeeze(-1)
    return logit_C, logsumexp_C, probabilities_CV.neg_().scatter_add_(-1, column_C1, here_C1.to(exact))


def _rescale(residual_CV: Tensor, column_C1: Tensor, here_C1: Tensor, share_C: Tensor, logprobs_C: Tensor) -> None:
    """Residuals over this rank's rows become, in place, those over all ranks' rows.

    Args:
        residual_CV: of `_residual`, perhaps rounded.
        column_C1, here_C1: of `_columns`.
        share_C: this rank's part of each row's probability.
        logprobs_C: over all ranks' rows.
    """
    residual_CV.mul_(share_C[:, None])
    label_C1 = -logprobs_C[:, None].expm1()  # 1 - p: 1 minus a rounded p would have few digits left
    others_C1 = residual_CV.gather(-1, column_C1)
    residual_CV.scatter_(-1, column_C1, label_C1.to(residual_CV.dtype).where(here_C1, others_C1))


def _over_ranks(logit_T: Tensor, logsumexp_T: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The labels' logit_T and logsumexp_T over all ranks' rows; one exchange."""
    local_2T = torch.stack([logit_T, logsumexp_T])
    all_R2T = local_2T.new_empty(group.size(), *local_2T.shape)
    all_gather(all_R2T.flatten(0, 1), local_2T, group=group)
    return all_R2T[:, 0].sum(0), all_R2T[:, 1].logsumexp(0)


class _LabelLogprobs(torch.autograd.Function):
    """logprobs_T from (hidden_TN, head_VN, labels_T); see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TN: Tensor, head_VN: Tensor, labels_T: Tensor, keep: bool, shard: VocabularyShard | None
    ) -> Tensor:
        rows, vocabulary = labels_T.shape[0], head_VN.shape[0]
        column_T1, here_T1 = _columns(labels_T, vocabulary, shard)
        kept_bytes = rows * vocabulary * hidden_TN.element_size()
        kept_TV = None
        if keep and hidden_TN.element_size() == 2 and kept_bytes <= KEPT_BYTES:
            kept_TV = hidden_TN.new_empty(rows, vocabulary)
        exact = torch.promote_types(hidden_TN.dtype, torch.float32)
        logit_T = torch.zeros(rows, dtype=exact, device=hidden_TN.device)
        logsumexp_T = torch.full_like(logit_T, -torch.inf)  # of no rows
        for chunk in _chunks(rows, vocabulary, hidden_TN.device):
            logit_T[chunk], logsumexp_T[chunk], residual_CV = _residual(
                hidden_TN[chunk], head_VN, column_T1[chunk], here_T1[chunk]
            )
            if kept_TV is not None:
                kept_TV[chunk] = residual_CV
        if shard is None:
            ctx.save_for_backward(hidden_TN, head_VN, column_T1, here_T1, kept_TV, None, None)
            return logit_T - logsumexp_T
        logit_T, everywhere_T = _over_ranks(logit_T, logsumexp_T, shard.group)
        share_T, logprobs_T = (logsumexp_T - everywhere_T).exp(), logit_T - everywhere_T
        if kept_TV is not None:
            for chunk in _chunks(rows, vocabulary, hidden_TN.device):
                _rescale(kept_TV[chunk], column_T1[chunk], here_T1[chunk], share_T[chunk], logprobs_T[chunk])
        ctx.save_for_backward(hidden_TN, head_VN, column_T1, here_T1, kept_TV, share_T, logprobs_T)
        return logprobs_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        hidden_TN, head_VN, column_T1, here_T1, kept_TV, share_T, logprobs_T = ctx.saved_tensors
        grad_T1 = grad_T[:, None].to(hidden_TN.dtype)
        scaled_TN = hidden_TN * grad_T1
        if kept_TV is not None:
            return (kept_TV @ head_VN).mul_(grad_T1), kept_TV.t() @ scaled_TN, None, None, None
        grad_hidden_TN = torch.zeros_like(hidden_TN)
        grad_head_VN = torch.zeros_like(head_VN, dtype=grad_T.dtype)
        for chunk in _chunks(hidden_TN.shape[0], head_VN.shape[0], hidden_TN.device):
            here = column_T1[chunk], here_T1[chunk]
            residual_CV = _residual(hidden_TN[chunk], head_VN, *here)[2]
            if share_T is not None:
                _rescale(residual_CV, *here, share_T[chunk], logprobs_T[chunk])
            residual_CV = residual_CV.to(hidden_TN.dtype)
            torch.mm(residual_CV, head_VN, out=grad_hidden_TN[chunk])
            grad_head_VN += residual_CV.t() @ scaled_TN[chunk]
        return grad_hidden_TN.mul_(grad_T1), grad_head_VN.to(head_VN.dtype), None, None, None
