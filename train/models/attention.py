"""Attention in which documents never see each other (scaled dot products: Vaswani et al. 2017, arXiv:1706.03762;
grouped queries: Ainslie et al. 2023, arXiv:2305.13245).

What a query may see is decided once per forward pass by `visibility`; every layer then calls `attention`.

Shape suffixes: B sequences, L tokens (queries), S keys, H query heads, K key/value heads, D features of a head; of a
block mask: Q blocks of queries, K blocks of keys.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import LongrunError
from train.models.blocked import blocked_attention

BACKENDS = ("auto", "sdpa", "flex", "flash")
BLOCK = 128
"""Queries, and keys, of a block of FlexAttention."""


class AttentionError(LongrunError):
    """The attention kernel that was asked for cannot run here."""


@dataclass(frozen=True)
class Segments:
    """Runs of tokens of one document in the flattened batch, for kernels that take variable lengths.

    Args:
        offsets: first token of each run, and the number of tokens at the end, int32.
        longest: tokens in the longest run.
    """

    offsets: Tensor
    longest: int


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: those of its own document and, where `causal`, none that come later.

    Args:
        causal: whether later keys are hidden.
        restriction: None where nothing else is hidden; Segments; or a boolean mask_BLS or FlexAttention's BlockMask,
            which hide later keys too.
        index_L: place of each query in the sequence, where the queries are some of its tokens; None where they are all,
            or the last.
    """

    causal: bool
    restriction: Any = None
    index_L: Tensor | None = None


def visibility(
    documents_BL: Tensor,
    *,
    causal: bool,
    backend: str = "auto",
    key_documents_BS: Tensor | None = None,
    index_L: Tensor | None = None,
) -> Visibility:
    """Choose the cheapest way to say what each token sees that is right for these documents.

    Padding (document -1) sees padding only, so that no row is empty and nothing becomes NaN.

    Args:
        documents_BL: document number of each query.
        causal: hide later tokens.
        backend: "sdpa", "flex", "flash", or "auto": SDPA on CPU, where looking at the documents costs nothing, and
            FlexAttention elsewhere, whose mask is made on the device without the host waiting for it.
        key_documents_BS: document of each key where keys are more than queries. These are then the last ones (of a
            cache), or those that index_L says.
        index_L: place of each query among the keys.

    Raises:
        AttentionError: flash-attn was asked for and is not installed, or there is no GPU for it, or queries are some of
            the keys only; FlexAttention was asked for on a CPU, with gradients.
    """
    if key_documents_BS is not None and index_L is None:
        return _cached_visibility(documents_BL, key_documents_BS, causal)
    if backend == "auto":
        backend = "sdpa" if documents_BL.device.type == "cpu" else "flex"
    if backend == "flex":
        if documents_BL.device.type == "cpu" and torch.is_grad_enabled():
            raise AttentionError("model.attention=flex has no backward pass on CPU; use model.attention=auto.")
        return Visibility(causal, _block_mask(documents_BL, causal, key_documents_BS, index_L), index_L)
    if backend == "flash" and index_L is not None:
        raise AttentionError(
            "model.attention=flash needs every query's keys in one run, which context-parallel ranks do not have; use "
            "model.attention=auto."
        )
    if key_documents_BS is not None and index_L is not None:
        return _partial_visibility(documents_BL, key_documents_BS, index_L, causal)
    if backend == "flash":
        _flash()
        return Visibility(causal, _segments(documents_BL))
    if causal:
        # Each token continues the document before it, or is padding: the triangle hides all that must be hidden from
        # the real ones, and the padding's own rows are never read.
        before_BL, after_BL = documents_BL[:, :-1], documents_BL[:, 1:]
        if bool(((before_BL == after_BL) | (after_BL < 0)).all()):
            return Visibility(causal=True)
    elif bool((documents_BL == documents_BL[:, :1]).all()):
        return Visibility(causal=False)
    mask_BLL = documents_BL[:, :, None] == documents_BL[:, None, :]
    return Visibility(causal, mask_BLL.tril() if causal else mask_BLL)


def _cached_visibility(documents_BL: Tensor, key_documents_BS: Tensor, causal: bool) -> Visibility:
    queries, keys = documents_BL.shape[1], key_documents_BS.shape[1]
    mask_BLS = documents_BL[:, :, None] == key_documents_BS[:, None, :]
    if causal:
        mask_BLS = mask_BLS.tril(keys - queries)
    return Visibility(causal, mask_BLS)


def _partial_visibility(documents_BL: Tensor, key_documents_BS: Tensor, index_L: Tensor, causal: bool) -> Visibility:
    mask_BLS = documents_BL[:, :, None] == key_documents_BS[:, None, :]
    if causal:
        mask_BLS &= index_L[:, None] >= torch.arange(key_documents_BS.shape[1], device=index_L.device)
    return Visibility(causal, mask_BLS, index_L)


def attention(q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, visible: Visibility) -> Tensor:
    """out_BLHD: each head's values, averaged by softmax(q k / sqrt(D)) over the visible keys."""
    restriction = visible.restriction
    if isinstance(restriction, Segments):
        return _varlen(q_BLHD, k_BSKD, v_BSKD, restriction, visible.causal)
    q_BHLD, k_BKSD, v_BKSD = q_BLHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    if restriction is None or isinstance(restriction, Tensor):
        if q_BLHD.device.type == "cpu" and q_BLHD.element_size() == 2 and q_BLHD.shape[1] > 1:
            return blocked_attention(q_BHLD, k_BKSD, v_BKSD, restriction, visible.causal).transpose(1, 2)
        out_BHLD = F.scaled_dot_product_attention(
            q_BHLD,
            k_BKSD,
            v_BKSD,
            attn_mask=None if restriction is None else restriction[:, None],
            is_causal=visible.causal and restriction is None,
            enable_gqa=True,
        )
    else:
        kernel = _flex_compiled() if q_BLHD.is_cuda else _flex_eager()
        out_BHLD = kernel(q_BHLD, k_BKSD, v_BKSD, block_mask=restriction, enable_gqa=True)
    return out_BHLD.transpose(1, 2)


def _block_mask(documents_BL: Tensor, causal: bool, key_documents_BS: Tensor | None, index_L: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    seen_BS = documents_BL if key_documents_BS is None else key_documents_BS

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = documents_BL[b, q] == seen_BS[b, k]
        return same & ((q if index_L is None else index_L[q]) >= k) if causal else same

    (batch, queries), keys = documents_BL.shape, seen_BS.shape[1]
    if index_L is None:
        return create_block_mask(visible, batch, None, queries, keys, device=documents_BL.device)
    # Some of a long sequence's queries: the mask of all pairs, from which blocks are made there, would not fit.
    some_BQK, all_BQK = _seen_blocks(documents_BL, seen_BS, index_L, causal)
    return BlockMask.from_kv_blocks(
        *_in_order(some_BQK & ~all_BQK),
        *_in_order(all_BQK),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )


def _seen_blocks(
    documents_BL: Tensor, key_documents_BS: Tensor, index_L: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """some_BQK: whether a query of a block may see a key of a block; all_BQK: whether all see all. From the lowest and
    highest document and place of each block, so sometimes too cautious, never wrong."""
    low_BQ1, high_BQ1 = (t[..., None] for t in _bounds(documents_BL))
    low_B1K, high_B1K = (t[:, None] for t in _bounds(key_documents_BS))
    some_BQK = (low_BQ1 <= high_B1K) & (high_BQ1 >= low_B1K)
    all_BQK = (low_BQ1 == high_B1K) & (high_BQ1 == low_B1K)
    first_K = torch.arange(0, key_documents_BS.shape[1], BLOCK, device=index_L.device)
    if causal:
        earliest_Q, latest_Q = _bounds(index_L)
        some_BQK &= latest_Q[:, None] >= first_K
        all_BQK &= earliest_Q[:, None] >= first_K + BLOCK - 1
    first_Q = torch.arange(0, index_L.shape[0], BLOCK, device=index_L.device)
    filled_QK = (first_Q[:, None] + BLOCK <= index_L.shape[0]) & (first_K + BLOCK <= key_documents_BS.shape[1])
    return some_BQK, all_BQK & filled_QK


def _bounds(values_BL: Tensor) -> tuple[Tensor, Tensor]:
    """lowest_BQ and highest_BQ of each block of values."""
    missing, limits = -values_BL.shape[-1] % BLOCK, torch.iinfo(values_BL.dtype)
    lowest_BQ = F.pad(values_BL, (0, missing), value=limits.max).unflatten(-1, (-1, BLOCK)).amin(-1)
    return lowest_BQ, F.pad(values_BL, (0, missing), value=limits.min).unflatten(-1, (-1, BLOCK)).amax(-1)


def _in_order(chosen_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: these first."""
    order_BQK = chosen_BQK.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_BQK.sum(-1, dtype=torch.int32)[:, None], order_BQK.int()[:, None]


def _flex_eager() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _flex_compiled() -> Callable[..., Any]:
    return torch.compile(_flex_eager())  # lengths that vary (DPO) become dynamic instead of falling back


def _flash() -> Callable[..., Tensor]:
    if not torch.cuda.is_available():
        raise AttentionError("model.attention=flash needs a CUDA device and there is none; use model.attention=auto.")
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise AttentionError(
            f"model.attention=flash needs the package flash-attn, which does not import here ({error}); "
            "install it with pip install 'longrun[gpu]', or use model.attention=auto."
        ) from error
    return flash_attn_varlen_func


def _segments(documents_BL: Tensor) -> Segments:
    """Cut the flattened batch wherever the document or the sequence changes (the host waits for the count)."""
    starts_BL = torch.ones_like(documents_BL, dtype=torch.bool)
    starts_BL[:, 1:] = documents_BL[:, 1:] != documents_BL[:, :-1]
    starts = starts_BL.flatten().nonzero().flatten()
    offsets = torch.cat([starts, starts.new_tensor([documents_BL.numel()])])
    return Segments(offsets.int(), int(offsets.diff().max()))


def _varlen(q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, segments: Segments, causal: bool) -> Tensor:
    out = _flash()(
        q_BLHD.flatten(0, 1),
        k_BSKD.flatten(0, 1),
        v_BSKD.flatten(0, 1),
        cu_seqlens_q=segments.offsets,
        cu_seqlens_k=segments.offsets,
        max_seqlen_q=segments.longest,
        max_seqlen_k=segments.longest,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.view_as(q_BLHD)
