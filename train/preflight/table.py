"""What a preflight found, for people: a line for each machine."""

from collections.abc import Callable, Sequence
from statistics import median

from parallel.watch import spans
from train.preflight.base import Record, by_host
from train.preflight.clocks import bounds
from train.preflight.links import AXES

GB, GFLOPS = 1e9, 1e9


def table(records: Sequence[Record], wrong: Sequence[int]) -> str:
    """Machines in the order of their ranks, each with its slowest rank's figures.

    Args:
        records: of all ranks.
        wrong: ranks with a finding.
    """
    offsets = bounds(records)
    axes = [axis for axis in AXES if any(axis in record.found.get("links", {}) for record in records)]
    columns: dict[str, Callable[[str, list[Record]], str]] = {
        "machine": lambda host, there: host,
        "ranks": lambda host, there: spans(record.rank for record in there),
        "clock ms": lambda host, there: f"{1e3 * sum(offsets[host]) / 2:+.2f}" if host in offsets else "",
        "disk MB/s": lambda host, there: _least(there, lambda found: found["disk"]["mb_s"], ",.0f"),
        "GFLOP/s": lambda host, there: _least(there, lambda found: found["compute"]["flops"] / GFLOPS, ",.0f"),
        "memory GB": lambda host, there: _memory(there),
    }
    for axis in axes:
        columns[f"{axis} GB/s"] = lambda host, there, axis=axis: _least(  # type: ignore[misc]
            there, lambda found: max(found["links"][axis]["pairs"].values()), ".2f"
        )
        columns[f"{axis} together"] = lambda host, there, axis=axis: _least(  # type: ignore[misc]
            there, lambda found: found["links"][axis]["collective"], ".2f"
        )
    columns[""] = lambda host, there: "not fit" if {record.rank for record in there} & set(wrong) else ""
    rows = [[*columns], *([cell(host, there) for cell in columns.values()] for host, there in by_host(records).items())]
    rows.append(["median", "", "", _median(records, "disk", "mb_s", 1.0), _median(records, "compute", "flops", GFLOPS)])
    widths = [max(len(row[place]) for row in rows if place < len(row)) for place in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in _cells(row, widths)
        ).rstrip()
        for row in rows
    )


def _cells(row: list[str], widths: list[int]) -> "enumerate[tuple[str, int]]":
    return enumerate(zip(row, widths, strict=False))


def _least(there: Sequence[Record], figure: Callable[[dict], float], form: str) -> str:
    values = []
    for record in there:
        try:
            values.append(figure(record.found))
        except KeyError:  # not measured on this rank
            continue
    return format(min(values), form) if values else ""


def _median(records: Sequence[Record], check: str, key: str, unit: float) -> str:
    values = [r.found[check][key] for r in records if key in r.found.get(check, {})]
    return f"{median(values) / unit:,.0f}" if values else ""


def _memory(there: Sequence[Record]) -> str:
    """Needed of free: on the device where there is one, else by all ranks of the machine."""
    memory = [record.found["memory"] for record in there]
    if "device_needed" in memory[0]:
        fullest = max(memory, key=lambda one: one["device_needed"] / one["device_free"])
        return f"{fullest['device_needed'] / GB:.2f} of {fullest['device_free'] / GB:.2f}"
    needed, free = sum(one["host_needed"] for one in memory), min(one["host_free"] for one in memory)
    return f"{needed / GB:.2f} of {free / GB:.2f}"
