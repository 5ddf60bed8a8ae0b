"""Attention on a CPU in 16 bits, by blocks of queries, as dense matrix products.

PyTorch's own kernel for CPUs reaches a small part of what the bf16 instructions give, batched products most of it. Only
one block's scores exist at a time: the backward pass computes them again. Keys that come later than all that a block
sees are left out of its products.

Shape suffixes: B sequences, L tokens (queries), S keys, H query heads, K key/value heads, G = H/K query heads to each,
D features of a head, Z = B x K, R = G x (queries of a block), E keys up to the last that a block sees.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES = 128
"""Queries of a block: enough for efficient products, few enough that little of the causal half is computed in vain."""


def _blocks(length: int, keys: int, mask_BLS: Tensor | None, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys they may see."""
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        seen = keys
        if causal and length == keys:
            seen = end
        elif mask_BLS is not None:
            seen = int(mask_BLS[:, start:end].flatten(0, 1).any(0).nonzero().amax()) + 1  # a query sees itself
        yield slice(start, end), slice(0, seen)


def _probabilities(
    q_ZRD: Tensor, k_ZED: Tensor, mask_BLS: Tensor | None, causal: bool, queries: slice, keys: slice
) -> Tensor:
    """probabilities_ZRE = softmax(q k / sqrt(D)) over the visible keys; the sum in fp32."""
    rows, features = queries.stop - queries.start, q_ZRD.shape[-1]
    unused = q_ZRD.new_empty(()).expand(*q_ZRD.shape[:2], k_ZED.shape[1])
    scores_ZRE = torch.baddbmm(unused, q_ZRD, k_ZED.transpose(1, 2), beta=0, alpha=features**-0.5)
    if mask_BLS is not None:
        hidden_BRE = ~mask_BLS[:, queries, keys]
        bias_BRE = torch.zeros_like(hidden_BRE, dtype=q_ZRD.dtype).masked_fill_(hidden_BRE, -torch.inf)
        scores_ZRE.view(hidden_BRE.shape[0], -1, *hidden_BRE.shape[1:]).add_(bias_BRE[:, None])
    elif causal:
        triangle = torch.full((rows, rows), -torch.inf, dtype=q_ZRD.dtype).triu_(1)
        scores_ZRE.view(q_ZRD.shape[0], -1, rows, k_ZED.shape[1])[..., queries].add_(triangle)
    return torch.softmax(scores_ZRE, dim=-1)


@torch.library.custom_op("longrun::blocked_attention", mutates_args=())
def blocked_attention(q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_BLS: Tensor | None, causal: bool) -> Tensor:
    """out_BHLD.

    Args:
        q_BHLD, k_BKSD, v_BKSD: queries, keys and values; where there is no mask, of the same tokens.
        mask_BLS: True where a query sees a key; where `causal` and there are as many keys as queries, within the
            triangle only.
        causal: no key later than the query is visible.
    """
    batch, heads, length, features = q_BHLD.shape
    q_ZGLD = q_BHLD.reshape(batch * k_BKSD.shape[1], -1, length, features)
    k_ZSD, v_ZSD = k_BKSD.flatten(0, 1), v_BKSD.flatten(0, 1)
    out_ZGLD = torch.empty_like(q_ZGLD, memory_format=torch.contiguous_format)
    for queries, keys in _blocks(length, k_ZSD.shape[1], mask_BLS, causal):
        q_ZRD = q_ZGLD[:, :, queries].flatten(1, 2)
        p_ZRE = _probabilities(q_ZRD, k_ZSD[:, keys], mask_BLS, causal, queries, keys)
        out_ZGLD[:, :, queries] = torch.bmm(p_ZRE, v_ZSD[:, keys]).unflatten(1, (q_ZGLD.shape[1], -1))
    return out_ZGLD.view(batch, heads, length, features)


@blocked_attention.register_fake
def _(q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_BLS: Tensor | None, causal: bool) -> Tensor:
    return torch.empty_like(q_BHLD, memory_format=torch.contiguous_format)


@torch.library.custom_op("longrun::blocked_attention_backward", mutates_args=())
def _backward(
    grad_BHLD: Tensor, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_BLS: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    batch, _, length, features = q_BHLD.shape
    q_ZGLD = q_BHLD.reshape(batch * k_BKSD.shape[1], -1, length, features)
    grad_ZGLD = grad_BHLD.reshape(q_ZGLD.shape)
    k_ZSD, v_ZSD = k_BKSD.flatten(0, 1), v_BKSD.flatten(0, 1)
    dq_ZGLD = torch.empty_like(q_ZGLD, memory_format=torch.contiguous_format)
    dk_ZSD, dv_ZSD = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (k_ZSD, v_ZSD))
    for queries, keys in _blocks(length, k_ZSD.shape[1], mask_BLS, causal):
        q_ZRD, grad_ZRD = q_ZGLD[:, :, queries].flatten(1, 2), grad_ZGLD[:, :, queries].flatten(1, 2)
        p_ZRE = _probabilities(q_ZRD, k_ZSD[:, keys], mask_BLS, causal, queries, keys)
        dv_ZSD[:, keys] += torch.bmm(p_ZRE.transpose(1, 2), grad_ZRD)
        dp_ZRE = torch.bmm(grad_ZRD, v_ZSD[:, keys].transpose(1, 2))
        ds_ZRE = torch._softmax_backward_data(dp_ZRE, p_ZRE, -1, p_ZRE.dtype)
        dq_ZGLD[:, :, queries] = torch.bmm(ds_ZRE, k_ZSD[:, keys]).unflatten(1, (q_ZGLD.shape[1], -1))
        dk_ZSD[:, keys] += torch.bmm(ds_ZRE.transpose(1, 2), q_ZRD)
    scale = features**-0.5
    return dq_ZGLD.mul_(scale).view(q_BHLD.shape), dk_ZSD.mul_(scale).view(k_BKSD.shape), dv_ZSD.view(v_BKSD.shape)


@_backward.register_fake
def _(
    grad_BHLD: Tensor, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_BLS: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_BHLD, k_BKSD, v_BKSD))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_BHLD: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_BHLD, *ctx.saved_tensors, ctx.causal), None, None


blocked_attention.register_autograd(_differentiate, setup_context=_setup)
