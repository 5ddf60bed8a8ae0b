"""Context parallelism: each rank has some tokens of every sequence, and attention reaches the keys of the others.

For R ranks a sequence is cut into 2R chunks, of which rank r has number r and number 2R - 1 - r: where later keys are
hidden, all ranks then have the same work (Dubey et al. 2024, arXiv:2407.21783, section 3.3.2). Keys come in two ways.
Gathering (there, too) makes all of them present at once. In a ring (Liu et al. 2023, arXiv:2310.01889) they pass by,
one rank's at a time, while the softmax is kept up to date (Milakov and Gimelshein 2018, arXiv:1805.02867); the backward
pass lets them pass again. What a rank sends per layer, in units of its own keys and values, and how many it keeps:

            forward   backward                                        kept for the backward pass
    gather  R - 1     R - 1                                           R
    ring    R - 1     R - 1, and R times their gradients, in fp32     1

Shape suffixes: B sequences, l tokens of this rank, S tokens of a sequence, H query heads, K key/value heads, G = H/K
query heads to each, D features of a head, q queries and c keys of a tile, 2 keys and values, R ranks.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_gather, reduce_scatter

QUERIES = 512
"""Queries of a tile of the ring: bounds the scores that exist at a time."""


def take(values_BS: Tensor, ranks: int, rank: int) -> Tensor:
    """values_Bl: a rank's tokens, in their order.

    Args:
        values_BS: of whole sequences, whose length is a multiple of 2 x `ranks`; further dimensions may follow.
        ranks: that share them.
        rank: which of them.
    """
    chunks = values_BS.chunk(2 * ranks, dim=1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim=1)


def indices(length: int, ranks: int, rank: int, device: torch.device | None = None) -> Tensor:
    """index_l: the place in the sequence of each of a rank's tokens; arguments as in `take`."""
    return take(torch.arange(length, device=device)[None], ranks, rank)[0]


def gather_keys(k_BlKD: Tensor, v_BlKD: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """k_BSKD and v_BSKD of all tokens, in their order. Gradients are added up over the ranks."""
    k_BSKD, v_BSKD = _GatherSummed.apply(torch.cat([k_BlKD, v_BlKD]), group).chunk(2)
    return k_BSKD, v_BSKD


def gather_own(values_Bl: Tensor, group: dist.ProcessGroup) -> Tensor:
    """values_BS of all tokens, from which every rank computes the same: its own tokens' gradients are its own part."""
    return _GatherOwn.apply(values_Bl, group)


def install(model: Any, group: dist.ProcessGroup, ring: bool = False) -> None:
    """Make attention see the whole sequence wherever the model is told that it is given some of its tokens (`index_L`).

    Args:
        model: its modules with an attribute `attend(q, k, v, visible)`, and its own `visibility`, are given others. Not
            to be copied afterwards.
        group: the ranks that share each sequence.
        ring: pass keys and values around instead of gathering them.
    """
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = functools.partial(_ring if ring else _gather, module.attend, group)
    if ring:
        model.visibility = functools.partial(_places, model.visibility)


class _GatherSummed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_Bl: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(values_Bl, group)

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ranks = ctx.group.size()
        summed_BS = grad_BS.float() if grad_BS.device.type == "cpu" and grad_BS.element_size() == 2 else grad_BS
        grad_RBl = torch.cat([take(summed_BS, ranks, rank) for rank in range(ranks)])  # gloo adds up no 16-bit numbers
        grad_Bl = grad_RBl.new_empty(grad_BS.shape[0], *grad_RBl.shape[1:])
        reduce_scatter(grad_Bl, grad_RBl, group=ctx.group)
        return grad_Bl.to(grad_BS.dtype), None


class _GatherOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_Bl: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(values_Bl, group)

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return take(grad_BS, ctx.group.size(), ctx.group.rank()), None


def _gathered(values_Bl: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tokens in the order of the sequence."""
    values_RBl = values_Bl.new_empty(group.size(), *values_Bl.shape)
    all_gather(values_RBl.flatten(0, 1), values_Bl.contiguous(), group=group)
    early, late = values_RBl.chunk(2, dim=2)
    return torch.cat([*early, *late.flip(0)], dim=1)


Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


@torch.compiler.disable
def _gather(
    attend: Attend, group: dist.ProcessGroup, q_BlHD: Tensor, k_BlKD: Tensor, v_BlKD: Tensor, visible: Any
) -> Tensor:
    if visible.index_L is None:
        return attend(q_BlHD, k_BlKD, v_BlKD, visible)
    return attend(q_BlHD, *gather_keys(k_BlKD, v_BlKD, group), visible)


@dataclass(frozen=True)
class _Places:
    """Who sees whom, told without a mask.

    Args:
        causal: whether later keys are hidden.
        documents_BS: document of each token of the whole sequence; tokens see only their own.
    """

    causal: bool
    documents_BS: Tensor


def _places(
    visibility: Callable[..., Any],
    documents_Bl: Tensor,
    *,
    causal: bool,
    key_documents_BS: Tensor | None = None,
    index_L: Tensor | None = None,
    **options: Any,
) -> Any:
    if key_documents_BS is None or index_L is None:
        return visibility(documents_Bl, causal=causal, key_documents_BS=key_documents_BS, **options)
    return _Places(causal, key_documents_BS)


@torch.compiler.disable
def _ring(
    attend: Attend, group: dist.ProcessGroup, q_BlHD: Tensor, k_BlKD: Tensor, v_BlKD: Tensor, visible: Any
) -> Tensor:
    if not isinstance(visible, _Places):
        return attend(q_BlHD, k_BlKD, v_BlKD, visible)
    return _RingAttention.apply(q_BlHD, k_BlKD, v_BlKD, visible, group)


@dataclass(frozen=True)
class _Tile:
    """Queries of this rank and keys of another's, by their place among the rank's own.

    Args:
        queries: which.
        keys: which.
        triangle: they are of the same chunk, and later keys are hidden: the last query sees all of them.
    """

    queries: slice
    keys: slice
    triangle: bool

    def hidden(self, documents_Bl: Tensor, key_documents_Bl: Tensor) -> Tensor:
        """hidden_Bqc: which keys a query must not see."""
        hidden_Bqc = documents_Bl[:, self.queries, None] != key_documents_Bl[:, None, self.keys]
        if self.triangle:
            rows, columns = hidden_Bqc.shape[1:]
            later_qc = torch.ones(rows, columns, dtype=torch.bool, device=hidden_Bqc.device).triu_(columns - rows + 1)
            hidden_Bqc |= later_qc
        return hidden_Bqc


def _tiles(length: int, ranks: int, rank: int, other: int, causal: bool) -> Iterator[_Tile]:
    """Where `rank` may see keys of `other`; both have `length` tokens."""
    chunk = length // 2
    for i, own in enumerate((rank, 2 * ranks - 1 - rank)):
        for j, theirs in enumerate((other, 2 * ranks - 1 - other)):
            if causal and theirs > own:
                continue
            triangle = causal and theirs == own
            for start in range(0, chunk, QUERIES):
                end = min(start + QUERIES, chunk)
                queries = slice(i * chunk + start, i * chunk + end)
                yield _Tile(queries, slice(j * chunk, j * chunk + (end if triangle else chunk)), triangle)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices, in fp32 at least; what is added up is fp32 always. Not to be written into: selective
    recomputation keeps the products of the forward pass."""
    if a.is_cuda and a.element_size() == 2:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def _scores(q_BKGqD: Tensor, k_BKcD: Tensor, hidden_Bqc: Tensor) -> Tensor:
    """scores_BKGqc: q k / sqrt(D), -inf where hidden."""
    scores_BKGqc = _product(q_BKGqD.flatten(2, 3), k_BKcD.mT).unflatten(2, q_BKGqD.shape[2:4])
    return (scores_BKGqc * q_BKGqD.shape[-1] ** -0.5).masked_fill_(hidden_Bqc[:, None, None], -torch.inf)


def _finite(values: Tensor) -> Tensor:
    """With the lowest number for -inf, the logsumexp of nothing: exp(-inf - it) is 0 and not NaN."""
    return values.clamp(min=torch.finfo(values.dtype).min)


def _send_on(tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Begin to send to the next rank and to receive from the one before; what arrives, and what to wait for."""
    arriving, ranks, rank = torch.empty_like(tensor), group.size(), group.rank()
    sending = dist.P2POp(dist.isend, tensor, group=group, group_peer=(rank + 1) % ranks)
    receiving = dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % ranks)
    return arriving, dist.batch_isend_irecv([sending, receiving])


def _arrived(transfer: tuple[Tensor, list[dist.Work]]) -> Tensor:
    for work in transfer[1]:
        work.wait()
    return transfer[0]


class _RingAttention(torch.autograd.Function):
    """out_BlHD from (q_BlHD, k_BlKD, v_BlKD): attention to the keys of all ranks, with those of one present."""

    @staticmethod
    def forward(
        ctx: Any, q_BlHD: Tensor, k_BlKD: Tensor, v_BlKD: Tensor, places: _Places, group: dist.ProcessGroup
    ) -> Tensor:
        ranks, rank, length = group.size(), group.rank(), q_BlHD.shape[1]
        kv_2BKlD = torch.stack([k_BlKD, v_BlKD]).transpose(2, 3).contiguous()
        q_BKGlD = q_BlHD.unflatten(2, (k_BlKD.shape[2], -1)).permute(0, 2, 3, 1, 4).contiguous()
        out_BKGlD = torch.zeros_like(q_BKGlD, dtype=torch.promote_types(q_BlHD.dtype, torch.float32))
        logsumexp_BKGl = torch.full_like(out_BKGlD[..., 0], -torch.inf)
        documents_Bl, passing_2BKlD = take(places.documents_BS, ranks, rank), kv_2BKlD
        for step in range(ranks):
            source = (rank - step) % ranks
            transfer = _send_on(passing_2BKlD, group) if step < ranks - 1 else None
            k_BKlD, v_BKlD = passing_2BKlD
            their_documents_Bl = take(places.documents_BS, ranks, source)
            for tile in _tiles(length, ranks, rank, source, places.causal):
                hidden_Bqc = tile.hidden(documents_Bl, their_documents_Bl)
                scores_BKGqc = _scores(q_BKGlD[:, :, :, tile.queries], k_BKlD[:, :, tile.keys], hidden_Bqc)
                here_BKGq = scores_BKGqc.logsumexp(-1)
                p_BKGqc = scores_BKGqc.sub_(_finite(here_BKGq)[..., None]).exp_().to(q_BlHD.dtype)
                found_BKGqD = _product(p_BKGqc.flatten(2, 3), v_BKlD[:, :, tile.keys]).unflatten(2, p_BKGqc.shape[2:4])
                before_BKGq, out_BKGqD = logsumexp_BKGl[..., tile.queries], out_BKGlD[:, :, :, tile.queries]
                both_BKGq = torch.logaddexp(before_BKGq, here_BKGq)
                out_BKGqD.mul_((before_BKGq - _finite(both_BKGq)).exp()[..., None])
                out_BKGqD.addcmul_(found_BKGqD, (here_BKGq - _finite(both_BKGq)).exp()[..., None])
                before_BKGq.copy_(both_BKGq)
            if transfer is not None:
                passing_2BKlD = _arrived(transfer)
        out_BKGlD = out_BKGlD.to(q_BlHD.dtype)
        ctx.save_for_backward(q_BKGlD, kv_2BKlD, out_BKGlD, logsumexp_BKGl)
        ctx.places, ctx.group = places, group
        return out_BKGlD.permute(0, 3, 1, 2, 4).flatten(2, 3)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_BlHD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BKGlD, kv_2BKlD, out_BKGlD, logsumexp_BKGl = ctx.saved_tensors
        places, group = ctx.places, ctx.group
        ranks, rank, length = group.size(), group.rank(), grad_BlHD.shape[1]
        grad_BKGlD = grad_BlHD.unflatten(2, q_BKGlD.shape[1:3]).permute(0, 2, 3, 1, 4).contiguous()
        dq_BKGlD = torch.zeros_like(q_BKGlD, dtype=logsumexp_BKGl.dtype)
        inner_BKGl = (grad_BKGlD.to(dq_BKGlD.dtype) * out_BKGlD).sum(-1)
        documents_Bl, passing_2BKlD = take(places.documents_BS, ranks, rank), kv_2BKlD
        grads: tuple[Tensor, list[dist.Work]] | None = None
        for step in range(ranks):
            source = (rank - step) % ranks
            transfer = _send_on(passing_2BKlD, group) if step < ranks - 1 else None
            k_BKlD, v_BKlD = passing_2BKlD
            dkv_2BKlD = torch.zeros_like(passing_2BKlD, dtype=dq_BKGlD.dtype)
            their_documents_Bl = take(places.documents_BS, ranks, source)
            for tile in _tiles(length, ranks, rank, source, places.causal):
                k_BKcD, v_BKcD = k_BKlD[:, :, tile.keys], v_BKlD[:, :, tile.keys]
                q_BKGqD, grad_BKGqD = (t[:, :, :, tile.queries] for t in (q_BKGlD, grad_BKGlD))
                scores_BKGqc = _scores(q_BKGqD, k_BKcD, tile.hidden(documents_Bl, their_documents_Bl))
                p_BKGqc = scores_BKGqc.sub_(logsumexp_BKGl[..., tile.queries, None]).exp_()
                q_BKQD, grad_BKQD = q_BKGqD.flatten(2, 3), grad_BKGqD.flatten(2, 3)
                dp_BKGqc = _product(grad_BKQD, v_BKcD.mT).view_as(p_BKGqc)
                ds_BKGqc = (dp_BKGqc - inner_BKGl[..., tile.queries, None]).mul_(p_BKGqc)
                ds_BKQc = ds_BKGqc.mul_(q_BKGqD.shape[-1] ** -0.5).to(q_BKGlD.dtype).flatten(2, 3)
                dkv_2BKlD[0, :, :, tile.keys] += _product(ds_BKQc.mT, q_BKQD)
                dkv_2BKlD[1, :, :, tile.keys] += _product(p_BKGqc.to(q_BKGlD.dtype).flatten(2, 3).mT, grad_BKQD)
                dq_BKGlD[:, :, :, tile.queries] += _product(ds_BKQc, k_BKcD).unflatten(2, q_BKGqD.shape[2:4])
            if grads is not None:
                dkv_2BKlD += _arrived(grads)  # of the ranks where these keys have been
            grads = _send_on(dkv_2BKlD, group)
            if transfer is not None:
                passing_2BKlD = _arrived(transfer)
        assert grads is not None
        dk_BlKD, dv_BlKD = _arrived(grads).to(kv_2BKlD.dtype).transpose(2, 3)
        return dq_BKGlD.to(q_BKGlD.dtype).permute(0, 3, 1, 2, 4).flatten(2, 3), dk_BlKD, dv_BlKD, None, None
