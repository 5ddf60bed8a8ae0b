"""Attention to one long sequence whose tokens are shared among ranks: keys gathered, or passed around in a ring.

Shape suffixes: B sequences, l tokens of a rank, S tokens of a sequence, H query heads, K key/value heads, D features of
a head.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from conf.registry import register
from parallel import distributed
from parallel.context import indices, install, take
from tools.ranks import run_ranks
from train.models.attention import attention, visibility


@register("bench", "context")
@dataclass(frozen=True)
class ContextBench:
    """Forward and backward of one layer's attention, causal, over documents of equal length.

    Args:
        ranks: processes of this machine that share the sequence.
        length: tokens of the sequence; a multiple of 2 x `ranks` and of `documents`.
        documents: that it holds.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: features of a head.
        passes: timed ones; one more warms up.
    """

    ranks: int = 2
    length: int = 4096
    documents: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    passes: int = 3

    def run(self) -> dict[str, float]:
        """Measure; per rank: megabytes sent, megabytes kept for the backward pass (masks too), seconds."""
        figures = {"alone: s": run_ranks(1, _measure, self, None, timeout_s=600)[0]["s"]}
        for way in ("gather", "ring"):
            found = run_ranks(self.ranks, _measure, self, way == "ring", timeout_s=600)[0]
            figures |= {f"{way}: {name}": value for name, value in found.items()}
        return figures


class Sent(TorchDispatchMode):
    """Bytes that this rank's collectives send."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.bytes = ranks, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name == "c10d::_allgather_base_":
            self.bytes += args[1].nbytes * (self.ranks - 1)
        elif name == "c10d::_reduce_scatter_base_":
            self.bytes += args[1].nbytes * (self.ranks - 1) / self.ranks
        elif name == "c10d::send":
            self.bytes += args[0][0].nbytes
        return function(*args, **(kwargs or {}))


class Layer(nn.Module):
    """The seams of a decoder."""

    attend: Callable[..., Tensor]
    visibility: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.visibility = attention, visibility


def _measure(bench: ContextBench, ring: bool | None) -> dict[str, float]:
    """On each rank; `ring` is None in one process."""
    world = distributed.start()
    layer, group = Layer(), dist.group.WORLD
    if ring is not None and group is not None:
        install(layer, group, ring)
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    for heads in (bench.heads, bench.kv_heads, bench.kv_heads):
        whole_BSHD = torch.randn(1, bench.length, heads, bench.head_dim, generator=generator)
        tensors.append((whole_BSHD if ring is None else take(whole_BSHD, world.size, world.rank)).requires_grad_())
    documents_BS = torch.arange(bench.length)[None] // (bench.length // bench.documents)
    index_l = None if ring is None else indices(bench.length, world.size, world.rank)
    mine_Bl = documents_BS if index_l is None else documents_BS[:, index_l]
    seen_BS = None if index_l is None else documents_BS
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def once() -> None:
        visible = layer.visibility(mine_Bl, causal=True, key_documents_BS=seen_BS, index_L=index_l)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            out_BlHD = layer.attend(*tensors, visible)
        torch.autograd.grad(out_BlHD, tensors, torch.ones_like(out_BlHD))

    with Sent(world.size) as sent:
        once()
    kept_bytes = sum(kept.values())
    seconds = []
    for _ in range(bench.passes):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return {
        "sent MB": sent.bytes / 1e6,
        "kept MB": kept_bytes / 1e6,
        "s": statistics.median(seconds),
    }
