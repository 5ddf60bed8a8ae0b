"""Paths: the run directory is one directory, whichever machine looks at it, and each can write there."""

import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from train.preflight.base import Finding, Record, Site, by_host, who

if TYPE_CHECKING:
    from train.preflight.limits import Preflight

TOKEN = ".preflight"
APPEARS_S = 5.0
"""So long a file that another machine wrote may take to be seen: network file systems keep listings for seconds."""


def measure(site: Site) -> list[str] | None:
    """What is wrong with the directories, as this machine sees them."""
    token = torch.randint(2**62, (1,))
    dist.broadcast(token, 0)
    written = site.directory / TOKEN
    problems = []
    if site.world.rank == 0:
        problems += _problems_of(lambda: written.write_text(f"{token.item()}\n"), site.directory)
    dist.barrier()
    if site.leads:
        if not problems and not _appears(written, f"{token.item()}\n"):
            problems.append(
                f"{site.directory} is not the directory that rank 0 writes to: what it wrote there is not seen. Give a "
                "run_dir on a file system that all machines share"
            )
        own = site.directory / f"{TOKEN}-{site.world.rank}"
        problems += _problems_of(lambda: _write(own), site.directory)
        temporary = Path(tempfile.gettempdir())
        # Machines may share it, and in containers their processes have the same numbers.
        problems += _problems_of(lambda: _write(temporary / f"{TOKEN}-{uuid.uuid4().hex}"), temporary)
    dist.barrier()
    if site.world.rank == 0:
        written.unlink(missing_ok=True)
    return sorted(set(problems)) if site.leads else None


def judge(records: Sequence[Record], limits: "Preflight") -> list[Finding]:
    """The problems of each machine."""
    return [
        Finding("paths", [record.rank for record in there], f"{who(there)}: {problem}.")
        for there in by_host(records).values()
        for record in there
        for problem in record.found.get("paths", [])
    ]


def _write(file: Path) -> None:
    """As a checkpoint is: written, synced, renamed, removed."""
    moved = file.with_name(file.name + ".moved")
    with open(file, "w") as stream:
        stream.write("x")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(file, moved)
    moved.unlink()


def _problems_of(act, where: Path) -> list[str]:  # type: ignore[no-untyped-def]
    try:
        act()
    except OSError as error:
        return [f"{where} cannot be written to ({error.strerror})"]
    return []


def _appears(file: Path, text: str) -> bool:
    deadline = time.monotonic() + APPEARS_S
    while True:
        try:
            if file.read_text() == text:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
