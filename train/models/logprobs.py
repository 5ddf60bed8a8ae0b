"""Log-probabilities of labels, fused with the output head so that no B x L x V tensor in fp32 ever exists.

For a labelled row t with hidden state h_t, logits z_t = W h_t and label y_t:

    logprob_t = z_t[y_t] - logsumexp(z_t)
    residual_t = onehot(y_t) - softmax(z_t)          d logprob_t / d z_t
    dh_t = g_t residual_t W,   dW = sum_t residual_t (g_t h_t)^T

where g_t, the gradient that arrives for t, is known in the backward pass only. It scales rows, so it can be applied to
the narrow side of both products; the wide residual is formed once, in the forward pass, while its logits are in the
processor's cache. In 16-bit compute it is kept, as wide as the logits any 16-bit model would keep, up to `KEPT_BYTES`;
beyond that, and in fp32, it is computed again, chunk by chunk (one more product of four).

Shape suffixes: B sequences, L tokens, T labelled rows, C rows of a chunk, N model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
KEPT_BYTES = 2 * 1024**3
"""Most bytes of 16-bit residuals kept from the forward to the backward pass, per call."""
ROUND_ROWS_TO = 128
"""Labelled rows are computed in multiples of this many."""


def logprobs(hidden_BLN: Tensor, head_VN: Tensor, labels_BL: Tensor) -> Tensor:
    """logprobs_BL: the log-probability of each label in nats, fp32 (fp64 for fp64); 0 where the label is -100.

    On CPU, rows without a label are not computed at all. Elsewhere they are, and masked: counting them would make the
    host wait for the device.

    Args:
        hidden_BLN: hidden states, after the last norm.
        head_VN: output matrix, in the same dtype.
        labels_BL: int64 token ids, or -100.
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
        found_T = _LabelLogprobs.apply(hidden_TN[rows_T], head_VN, labels_T[rows_T].clamp(min=0), keep)
        logprobs_T = found_T.new_zeros(labels_T.shape).index_put((rows_T[:labelled],), found_T[:labelled])
    else:
        found_T = _LabelLogprobs.apply(hidden_TN, head_VN, labels_T.clamp(min=0), keep)
        logprobs_T = found_T.masked_fill(ignored_T, 0.0)
    # No view: FSDP hooks onto what a model returns, and an in-place operation on a view would lose the hook.
    return logprobs_T.view(labels_BL.shape).clone()


def _host_may_look(tensor: Tensor) -> bool:
    """Whether reading a value of it waits for nobody."""
    return tensor.device.type == "cpu"


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Chunks whose fp32 logits fit a CPU's last-level cache, or are large enough to fill a GPU."""
    elements = 2**22 if device.type == "cpu" else 2**27
    size = max(1, elements // vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _residual(hidden_CN: Tensor, head_VN: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """logprobs_C and residual_CV, at least fp32."""
    logits_CV = F.linear(hidden_CN, head_VN)
    exact = torch.promote_types(logits_CV.dtype, torch.float32)
    probabilities_CV = torch.softmax(logits_CV, dim=-1, dtype=exact)
    labels_C1 = labels_C[:, None]
    # logsumexp = max - log softmax(max): softmax at the maximum is at least 1/V, so its logarithm is exact enough,
    # which that of the label's own probability, perhaps underflown, is not.
    highest_C = logits_CV.amax(-1).to(exact) - probabilities_CV.amax(-1).log()
    logprobs_C = logits_CV.gather(-1, labels_C1).squeeze(-1).to(exact) - highest_C
    residual_CV = probabilities_CV.neg_()
    return logprobs_C, residual_CV.scatter_add_(-1, labels_C1, residual_CV.new_ones(labels_C1.shape))


class _LabelLogprobs(torch.autograd.Function):
    """logprobs_T from (hidden_TN, head_VN, labels_T); see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, hidden_TN: Tensor, head_VN: Tensor, labels_T: Tensor, keep: bool) -> Tensor:
        rows, vocabulary = labels_T.shape[0], head_VN.shape[0]
        kept_bytes = rows * vocabulary * hidden_TN.element_size()
        kept_TV = None
        if keep and hidden_TN.element_size() == 2 and kept_bytes <= KEPT_BYTES:
            kept_TV = hidden_TN.new_empty(rows, vocabulary)
        exact = torch.promote_types(hidden_TN.dtype, torch.float32)
        logprobs_T = torch.empty(rows, dtype=exact, device=hidden_TN.device)
        for chunk in _chunks(rows, vocabulary, hidden_TN.device):
            logprobs_T[chunk], residual_CV = _residual(hidden_TN[chunk], head_VN, labels_T[chunk])
            if kept_TV is not None:
                kept_TV[chunk] = residual_CV
        ctx.save_for_backward(hidden_TN, head_VN, labels_T, kept_TV)
        return logprobs_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden_TN, head_VN, labels_T, kept_TV = ctx.saved_tensors
        grad_T1 = grad_T[:, None].to(hidden_TN.dtype)
        scaled_TN = hidden_TN * grad_T1
        if kept_TV is not None:
            return (kept_TV @ head_VN).mul_(grad_T1), kept_TV.t() @ scaled_TN, None, None
        grad_hidden_TN = torch.empty_like(hidden_TN)
        grad_head_VN = torch.zeros_like(head_VN, dtype=grad_T.dtype)
        for chunk in _chunks(labels_T.shape[0], head_VN.shape[0], hidden_TN.device):
            residual_CV = _residual(hidden_TN[chunk], head_VN, labels_T[chunk])[1].to(hidden_TN.dtype)
            torch.mm(residual_CV, head_VN, out=grad_hidden_TN[chunk])
            grad_head_VN += residual_CV.t() @ scaled_TN[chunk]
        return grad_hidden_TN.mul_(grad_T1), grad_head_VN.to(head_VN.dtype), None, None
