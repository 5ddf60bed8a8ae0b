"""What a preflight found, for people: a line for each machine."""

from collections.abc import Sequence
from statistics import median

from parallel.verdict import spans
from train.preflight.base import Record, by_host
from train.preflight.clocks import bounds
from train.preflight.links import AXES

MS, GB, GFLOPS = 1e-3, 1e9, 1e9


def table(records: Sequence[Record], wrong: Sequence[int]) -> str:
    """Machines in the order of their ranks, each with the figures of its slowest rank.

    Args:
        records: of all ranks.
        wrong: ranks with a finding.
    """
    offsets = bounds(records)
    axes = [axis for axis in AXES if any(axis in record.found.get("links", {}) for record in records)]
    carried = [f"{axis} GB/s: pair, all" for axis in axes]
    rows = [["machine", "ranks", "clock ms", "disk MB/s", "GFLOP/s", "memory GB", *carried]]
    for host, there in by_host(records).items():
        ranks = [record.rank for record in there]
        clock = f"{sum(offsets[host]) / 2 / MS:+.2f}" if host in offsets else ""
        figures = [", ".join(_figure(min(v), ".2f") for v in _links(there, axis)) for axis in axes]
        row = [host, spans(ranks), clock, *(_figure(min(v), ",.0f") for v in _speeds(there)), _memory(there), *figures]
        rows.append([*row, "not fit" if set(ranks) & set(wrong) else ""])
    usual = [", ".join(_figure(median(v), ".2f") for v in _links(records, axis)) for axis in axes]
    rows.append(["median", "", "", *(_figure(median(v), ",.0f") for v in _speeds(records)), "", *usual])
    widths = [max(len(row[place]) for row in rows if place < len(row)) for place in range(max(map(len, rows)))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)


def _figure(value: float, form: str) -> str:
    return "" if value != value else format(value, form)


def _speeds(records: Sequence[Record]) -> list[list[float]]:
    """Of disks in MB/s, of products in GFLOP/s; nan where nothing was measured."""
    disks = [record.found["disk"]["mb_s"] for record in records if "mb_s" in record.found.get("disk", {})]
    products = [record.found["compute"]["flops"] / GFLOPS for record in records if "compute" in record.found]
    return [disks or [float("nan")], products or [float("nan")]]


def _links(records: Sequence[Record], axis: str) -> list[list[float]]:
    """GB/s of each rank's better pair, and of the collective."""
    found = [record.found["links"][axis] for record in records if axis in record.found.get("links", {})]
    pairs = [max(one["pairs"].values()) for one in found]
    return [pairs or [float("nan")], [one["collective"] for one in found] or [float("nan")]]


def _memory(there: Sequence[Record]) -> str:
    """Needed of free: on the device where there is one, else by all ranks of the machine."""
    memory = [record.found["memory"] for record in there]
    if "device_needed" in memory[0]:
        fullest = max(memory, key=lambda one: one["device_needed"] / one["device_free"])
        return f"{fullest['device_needed'] / GB:.2f} of {fullest['device_free'] / GB:.2f}"
    needed, free = sum(one["host_needed"] for one in memory), min(one["host_free"] for one in memory)
    return f"{needed / GB:.2f} of {free / GB:.2f}"
