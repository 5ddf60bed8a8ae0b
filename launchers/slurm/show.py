"""What a person sees of jobs: a table, and what the ranks print."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.artifact import MANIFEST
from launchers.display import duration
from launchers.slurm import cluster, jobs
from launchers.slurm.cluster import Job, SlurmError
from launchers.slurm.script import LOGS

METRICS = "metrics.jsonl"
LAST_BYTES = 1 << 16
"""Of the metrics: the newest lines are looked at, not the file."""
FOLLOW_S = 0.2
STATE_S = 2.0


@dataclass(frozen=True)
class Row:
    """One run in the table."""

    run: str
    job: str
    state: str
    why: str
    restarts: int
    step: str
    left: str


def rows(directories: Sequence[Path]) -> list[Row]:
    """Of these runs; of all that have a live job without."""
    if directories:
        return [_row(directory, jobs.last_job(directory)) for directory in directories]
    ours = [job for job in cluster.live() if job.comment.startswith("/")]
    arrays = {job.comment: jobs.elements(Path(job.comment)) for job in ours if "_" in job.number}
    found = []
    for job in ours:
        directory = arrays.get(job.comment, {}).get(job.number, Path(job.comment))
        found.append(_row(directory, cluster.job(job.number)))
    return found


def table(directories: Sequence[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("job", "state", "restarts", "step", "left", "run", ""):
        table.add_column(name, overflow="fold")
    for row in rows(directories):
        table.add_row(row.job, row.state, str(row.restarts), row.step, row.left, row.run, row.why)
    Console(highlight=False, soft_wrap=True).print(table)


def _row(directory: Path, job: Job | None) -> Row:
    step, left = _progress(directory)
    finished = (directory / MANIFEST).exists()
    if job is None:
        state, why = ("done", "") if finished else ("unknown", f"Slurm has forgotten its job; see {directory / LOGS}")
        return Row(str(directory), "", state, why, 0, step, "")
    why = job.why
    if job.ended and not finished and job.state != "CANCELLED":
        why = f"exit code {job.code}; see {directory / LOGS}"
    running = job.state in ("RUNNING", "COMPLETING")
    where = f"on {job.nodes}" if running and job.nodes else why
    return Row(str(directory), job.number, job.state, where, job.restarts, step, left if running else "")


def _progress(directory: Path) -> tuple[str, str]:
    """The newest step and the time left, by the run's metrics."""
    last: dict[str, Any] = {}
    for line in _tail(directory / METRICS):
        try:
            last |= json.loads(line)
        except json.JSONDecodeError:
            continue
    eta = last.get("eta_s")
    return str(last.get("step", "")), duration(eta) if isinstance(eta, int | float) else ""


def _tail(file: Path) -> list[bytes]:
    """The last lines; the first of them may be torn."""
    try:
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - LAST_BYTES))
            return stream.read().splitlines()
    except FileNotFoundError:
        return []


def lines(directory: Path, rank: str, follow: bool) -> Iterator[str]:
    """What a rank printed, over all starts; with `follow` until the job has ended.

    Raises:
        SlurmError: there is nothing, and nothing more will come; names the ranks that there are.
    """
    file = directory / LOGS / ("job.log" if rank == "job" else f"rank-{rank}.log")
    if not file.exists() and not (follow and jobs.live_job(directory)):
        there = sorted(path.name for path in file.parent.glob("*.log"))
        job = jobs.live_job(directory)
        waits = f"; job {job.number} is {job.state} ({job.why})" if job else ""
        raise SlurmError(f"there is no {file}{waits}. There is: {', '.join(there) or 'nothing yet'}.")
    position, looked = 0, time.monotonic()
    live = follow
    while True:
        ended = not live
        if file.exists():
            with open(file, errors="replace") as stream:
                stream.seek(position)
                if text := stream.read():
                    yield text
                position = stream.tell()
        if ended:
            return
        time.sleep(FOLLOW_S)
        if time.monotonic() - looked > STATE_S:
            looked = time.monotonic()
            with suppress(SlurmError):  # no news
                live = jobs.live_job(directory) is not None
