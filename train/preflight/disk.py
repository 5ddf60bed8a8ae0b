"""Disk: room for what the run will keep there, and how fast each machine writes."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.checkpoints import CHECKPOINTS, steps
from train.preflight.base import Finding, Record, Site, slow_ranks

if TYPE_CHECKING:
    from train.preflight.limits import Preflight

MB = 1e6
CHUNK = 1 << 22


def measure(site: Site) -> dict[str, Any] | None:
    """Of the machine's first rank: bytes free and bytes yet to be written, and MB/s written and synced."""
    if not site.leads:
        return None
    found: dict[str, Any] = {}
    if site.world.rank == 0:
        found |= {"free": shutil.disk_usage(site.directory).free, "needed": _needed(site)}
    try:
        found["mb_s"] = _speed(site.directory / f".preflight-speed-{site.world.rank}", site.limits.disk_mb * MB)
    except OSError as error:
        found["problem"] = f"{site.directory} does not take {site.limits.disk_mb:g} MB ({error.strerror})"
    return found


def judge(records: Sequence[Record], limits: "Preflight") -> list[Finding]:
    """Too little room; machines that write more slowly than is asked for, or than the others."""
    having = [record for record in records if "disk" in record.found]
    found = []
    for record in having:
        disk = record.found["disk"]
        if "problem" in disk:
            found.append(Finding("disk", [record.rank], f"{record.host} (rank {record.rank}): {disk['problem']}."))
        if disk.get("free", 0) < limits.disk_room * disk.get("needed", 0):
            text = (
                f"{record.host} (rank {record.rank}): {disk['free'] / MB:,.0f} MB are free where run_dir is, "
                f"{disk['needed'] / MB:,.0f} MB x {limits.disk_room:g} are needed for the checkpoints that are kept, "
                "one more while it is written, and the model. Make room, lower stage.keep, or give another run_dir."
            )
            found.append(Finding("disk", [record.rank], text))
    speeds = {record.rank: record.found["disk"]["mb_s"] for record in having if "mb_s" in record.found["disk"]}
    for record in having:
        if speeds.get(record.rank, limits.disk_mb_s) < limits.disk_mb_s:
            text = (
                f"{record.host} (rank {record.rank}): writes {speeds[record.rank]:,.1f} MB/s to run_dir, at least "
                f"{limits.disk_mb_s:g} are asked for."
            )
            found.append(Finding("disk", [record.rank], text, slow=True))
    return found + slow_ranks(
        "disk", records, speeds, limits.share, lambda worst, usual: f"writes {worst:,.1f} MB/s, the median {usual:,.1f}"
    )


def _needed(site: Site) -> int:
    """Bytes that will be written over what is there now."""
    found = steps(site.directory / CHECKPOINTS)
    at_most = len(found) + to_come(site.config.stage, found[-1] if found else 0)
    kept = min(getattr(site.config.stage, "keep", 1) + 1, at_most)  # the oldest goes once the newest is whole
    there = sum(file.stat().st_size for file in (site.directory / CHECKPOINTS).rglob("*") if file.is_file())
    return max(0, kept * site.need.checkpoint - there) + site.need.model


def to_come(stage: Any, step: int) -> int:
    """Checkpoints that a training stage writes from a step on: every so many steps, and at the end."""
    if step >= stage.steps:
        return 0
    every = stage.checkpoint_every
    return ((stage.steps - 1) // every - step // every if every else 0) + 1


def _speed(file: Path, size: float) -> float:
    """MB/s of bytes that no file system can squeeze, written and synced."""
    chunk = os.urandom(min(CHUNK, int(size)))
    try:
        start = time.perf_counter()
        with open(file, "wb", buffering=0) as stream:
            written = 0
            while written < size:
                written += stream.write(chunk)
            os.fsync(stream.fileno())
        return written / MB / (time.perf_counter() - start)
    finally:
        file.unlink(missing_ok=True)
