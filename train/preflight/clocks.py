"""Clocks: what machines say of the time must go together, or logs, leases and records of attempts do not.

No rank leaves a reduction before every rank has entered it. So where rank r entered at b_r and left at a_r, each by its
own clock, clock r is ahead of clock 0 by at least b_r - a_0 and at most a_r - b_0, whatever the network did (the bounds
of Cristian 1989, "Probabilistic clock synchronization", around a reply). Of several rounds the fastest narrows it most.
"""

import time
from collections.abc import Sequence
from statistics import median_low
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from train.preflight.base import Finding, Record, Site, by_host, who

if TYPE_CHECKING:
    from train.preflight.limits import Preflight

ROUNDS = 6


def measure(site: Site) -> list[tuple[float, float]] | None:
    """When this rank entered and left each round, by its own clock."""
    if site.world.size == 1:
        return None
    stamps = []
    tick = torch.zeros(1)
    for _ in range(ROUNDS):
        before = time.time()
        dist.all_reduce(tick)
        stamps.append((before, time.time()))
    return stamps


def judge(records: Sequence[Record], limits: "Preflight") -> list[Finding]:
    """Machines whose clock is certainly further from the usual one than is allowed."""
    offsets = bounds(records)
    if len(offsets) < 2:
        return []
    usual = median_low((low + high) / 2 for low, high in offsets.values())
    others = f"that of {next(iter(offsets))}" if len(offsets) == 2 else "the median's"
    found = []
    for host, there in by_host(records).items():
        low, high = (bound - usual for bound in offsets[host])
        if low > limits.clock_s or high < -limits.clock_s:
            ahead = (low + high) / 2
            text = (
                f"{who(there)}: its clock is {abs(ahead):.3f} s (+-{(high - low) / 2:.3f}) "
                f"{'ahead of' if ahead > 0 else 'behind'} {others}, at most {limits.clock_s:g} s are allowed: set it "
                "by NTP (chronyc makestep)."
            )
            found.append(Finding("clocks", [record.rank for record in there], text))
    return found


def bounds(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Machine -> by how much its clock is ahead of rank 0's, in s: at least, at most."""
    stamped = [record for record in records if "clocks" in record.found]
    if not stamped:
        return {}
    first = stamped[0].found["clocks"]
    offsets: dict[str, tuple[float, float]] = {}
    for record in stamped:
        low, high = offsets.get(record.host, (float("-inf"), float("inf")))
        for (before_0, after_0), (before_r, after_r) in zip(first, record.found["clocks"], strict=True):
            low, high = max(low, before_r - after_0), min(high, after_r - before_0)
        offsets[record.host] = low, high
    return offsets
