"""Links: what each mesh axis carries, and who is at the slow end.

A collective is as slow as its slowest member, so its rate tells that somebody is slow, and not who. Pairs tell: the
ranks of each group, in a ring, talk to one neighbour at a time, all groups at once. A rank both of whose pairs are slow
is slow itself; one of whose pairs only one is, has a slow neighbour.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layout import Layout
from train.preflight.base import Finding, Record, Site, slow_ranks

if TYPE_CHECKING:
    from train.preflight.limits import Preflight

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
REPEATS = 3
MB, GB = 1e6, 1e9


def groups(layout: Layout) -> dict[str, list[list[int]]]:
    """Axis of more than one rank -> the ranks of each of its groups, in the order of `parallel.mesh`."""
    inner = {"tp": 1, "cp": layout.tp, "dp_shard": layout.tp * layout.cp, "ep": layout.tp}
    inner["dp_replicate"] = inner["dp_shard"] * layout.dp_shard
    inner["pp"] = inner["dp_replicate"] * layout.dp_replicate
    found = {}
    for axis in AXES:
        size, stride = getattr(layout, axis), inner[axis]
        if size > 1:
            firsts = [rank for rank in range(layout.world_size) if rank // stride % size == 0]
            found[axis] = [[first + stride * place for place in range(size)] for first in firsts]
    return found


def phases(group: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The pairs of neighbours in a ring, in turns in which each rank is in one pair at most."""
    size = len(group)
    if size == 2:
        return [[(group[0], group[1])]]
    ring = [(group[place], group[(place + 1) % size]) for place in range(size)]
    turns = [ring[0 : size - size % 2 : 2], ring[1::2]]
    return turns if size % 2 == 0 else [*turns, [ring[-1]]]


def measure(site: Site) -> dict[str, Any] | None:
    """Axis -> GB/s of its collective on this rank, and of each pair that this rank is in."""
    if not site.limits.full or site.world.size == 1:
        return None
    rank, device = site.world.rank, site.world.device
    data = torch.zeros(int(site.limits.links_mb * MB), dtype=torch.uint8, device=device)
    found: dict[str, Any] = {}
    for axis, all_groups in groups(site.config.parallel).items():
        mine = next(group for group in all_groups if rank in group)
        pairs: dict[int, float] = {}
        turns = phases(mine)
        for turn in turns:
            peer = next((other for pair in turn for other in pair if rank in pair and other != rank), None)
            seconds = _best(lambda peer=peer: exchange(data, peer), device)  # type: ignore[misc]
            if peer is not None:
                pairs[peer] = data.nbytes / seconds / GB
        own, _ = dist.new_subgroups_by_enumeration(all_groups)
        assert own is not None
        # What a ring sends and takes of each byte, so that the figure is that of the links, whatever the size.
        passes = (1 if axis in ("pp", "ep") else 2) * (len(mine) - 1) / len(mine)
        seconds = _best(_collective(axis, data, own), device)
        found[axis] = {"collective": passes * data.nbytes / seconds / GB, "pairs": pairs}
        dist.destroy_process_group(own)
    return found


def _collective(axis: str, data: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    """What the axis is used for: pipelines pass activations on, experts trade tokens, the others add up."""
    size = group.size()
    even = data[: data.numel() // size * size]
    if axis == "ep":
        taken = torch.empty_like(even)
        return lambda: dist.all_to_all_single(taken, even, group=group)
    if axis == "pp":
        return lambda: dist.broadcast(even, group_src=0, group=group)
    return lambda: dist.all_reduce(even, group=group)


def exchange(data: Tensor, peer: int | None) -> None:
    """Send to a rank what it sends back; without one, wait for the others' turn to end."""
    if peer is None:
        return
    taken = torch.empty_like(data)
    both = [dist.P2POp(dist.isend, data, peer), dist.P2POp(dist.irecv, taken, peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def _best(act: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few, each of which all ranks begin together; the first makes connections."""
    best = float("inf")
    for repeat in range(1 + REPEATS):
        dist.barrier()
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best


def judge(records: Sequence[Record], limits: "Preflight") -> list[Finding]:
    """Ranks that the links of an axis are slow to reach."""
    found = []
    for axis in AXES:
        values = dict(_links(records, axis))

        def say(worst: float, usual: float, axis: str = axis) -> str:
            return (
                f"its links along parallel.{axis} carry {worst:,.2f} GB/s, {worst / usual:.0%} of the median "
                f"({usual:,.2f}); at least {limits.share:.0%} are asked for. Look at its network card, cable, switch."
            )

        found += slow_ranks("links", records, values, limits.share, say)
    return found


def _links(records: Sequence[Record], axis: str) -> Iterator[tuple[int, float]]:
    """Rank -> GB/s of the better of its pairs, as both ends saw them."""
    seen: dict[tuple[int, int], float] = {}
    for record in records:
        for peer, rate in record.found.get("links", {}).get(axis, {}).get("pairs", {}).items():
            pair = (min(record.rank, int(peer)), max(record.rank, int(peer)))
            seen[pair] = min(rate, seen.get(pair, rate))
    for record in records:
        own = [rate for pair, rate in seen.items() if record.rank in pair]
        if own:
            yield record.rank, max(own)
