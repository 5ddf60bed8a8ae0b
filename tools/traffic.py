"""What a rank sends, by mesh axis and collective: counted where the operators of c10d are dispatched.

Bytes are those of ring algorithms, which send the least (Patarasuk & Yuan 2009): of n ranks, each sends of S bytes

    all-reduce 2 S (n-1)/n    all-gather S (n-1)/n of the result    reduce-scatter S (n-1)/n of the input
    all-to-all what is not its own    broadcast S (n-1)/n    send S
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.layout import Layout

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""In the order of the ranks, the last next to each other."""

COLLECTIVES = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
}
"""Operators of the namespaces c10d and _c10d_functional; what these miss, `Traffic` refuses rather than leaves out."""
SILENT = ("recv_", "wait_tensor", "_wrap_tensor_autograd", "barrier", "check_for_nan")


class Traffic(TorchDispatchMode):
    """Counts what this rank sends while it is active.

    Args:
        layout: names the axes.

    Attributes:
        bytes: sent, by (axis, collective). An axis of several names has a group that spans them; "ep" are the experts'.
        calls: how often.
    """

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function.namespace, function._schema.name.split("::")[1]
        if namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            self._count(name, args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        kind, group = COLLECTIVES[name], _group(args)
        if group.size() == 1:
            return
        where = self._axis(group, kind), kind
        self.bytes[where] += round(_sent(name, kind, args, group.size()))
        self.calls[where] += 1

    def _axis(self, group: dist.ProcessGroup, kind: str) -> str:
        # A group that spans all ranks may be the same one for several axes: all-to-alls are the experts'.
        if "mesh_ep" in group.group_desc.split(" ") or (kind == "all-to-all" and self.layout.ep > 1):
            return "ep"
        return axis_of(dist.get_process_group_ranks(group), self.layout)


def axis_of(ranks: list[int], layout: Layout) -> str:
    """The axes along which the ranks of a group differ."""
    sizes = [getattr(layout, axis) for axis in AXES]
    places = [torch.unravel_index(torch.tensor(rank), sizes) for rank in ranks]
    return "+".join(axis for i, axis in enumerate(AXES) if len({int(place[i]) for place in places}) > 1)


def _group(args: Any) -> dist.ProcessGroup:
    for argument in reversed(args):
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument)
            except RuntimeError:  # the operator of a reduction, not a group
                continue
        if isinstance(argument, str) and argument != "sum":
            return dist.distributed_c10d._resolve_process_group(argument)  # type: ignore[arg-type]
    raise TypeError("a collective without a process group")


def _sent(name: str, kind: str, args: Any, ranks: int) -> float:
    """Bytes that this rank sends, by its tensors: c10d's operators have the output first, where there are two."""
    tensors = [t for t in _flat(args) if isinstance(t, Tensor)]
    others = (ranks - 1) / ranks
    if kind == "all-reduce":
        return 2 * others * sum(t.nbytes for t in tensors)
    if kind == "send":
        return float(tensors[0].nbytes)
    if kind == "broadcast":
        return others * tensors[0].nbytes
    own = tensors[-1]  # the input
    if kind == "all-gather":
        return float((ranks - 1) * own.nbytes)
    if kind == "reduce-scatter":
        return others * own.nbytes
    group = _group(args)
    splits = next((a for a in reversed(args) if isinstance(a, list) and len(a) == ranks), None)
    if splits is None:
        return others * own.nbytes
    return own.nbytes * (1 - splits[group.rank()] / max(1, sum(splits)))


def _flat(values: Any) -> list[Any]:
    return [leaf for value in values for leaf in (_flat(value) if isinstance(value, list | tuple) else [value])]
