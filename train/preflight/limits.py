"""Before the first step: is every machine fit for this run, and is there all that it needs?

All ranks measure, the first one judges what was found and names every machine that is slow or wrong at once, so that a
run of a thousand does not find them one restart after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from conf.errors import LongrunError, Problem
from conf.registry import register
from parallel.distributed import World
from parallel.precision import compute_dtype
from train.preflight import clocks, compute, disk, inputs, links, memory, paths
from train.preflight.base import Check, Finding, Record, Site, host
from train.preflight.memory import need_of
from train.rundir import together

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.start import Start

LEVELS = ("off", "quick", "full")
CHECKS: dict[str, Check] = {
    "paths": paths,
    "disk": disk,
    "inputs": inputs,
    "memory": memory,
    "clocks": clocks,
    "compute": compute,
    "links": links,
}
SHOWN = 40
"""Lines of a message that could have thousands."""


class PreflightError(LongrunError):
    """Machines or inputs are not fit for the run; names each."""


@register("preflight", "limits")
@dataclass(frozen=True)
class Preflight:
    """What is measured before the first step, and what is asked of each machine.

    Args:
        level: "off"; "quick": what costs a fraction of a second, slow machines are told and borne; "full": long enough
            to tell slow machines for certain, links too, and nobody trains with one.
        clock_s: largest difference of a machine's clock from the usual one, in s.
        share: what the slowest rank must reach of the median's rate of matrix products, of its links and its disk; in
            (0, 1].
        compute_s: seconds of matrix products.
        links_mb: size of the messages between ranks, in MB (10^6 bytes).
        disk_mb: bytes that each machine writes to run_dir, in MB.
        disk_mb_s: least speed of that, in MB/s, synced.
        disk_room: free bytes where run_dir is, as a multiple of what the run will write there: the checkpoints that are
            kept, one more, and the model.
        memory: largest share of the free memory that weights, gradients and moments may take; activations come on top.
    """

    level: str = "quick"
    clock_s: float = 1.0
    share: float = 0.5
    compute_s: float = 0.02
    links_mb: float = 1.0
    disk_mb: float = 1.0
    disk_mb_s: float = 1.0
    disk_room: float = 1.0
    memory: float = 0.95

    @property
    def full(self) -> bool:
        return self.level == "full"

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range."""
        found = []
        if self.level not in LEVELS:
            found.append(Problem("preflight.level", self.level, f"one of {', '.join(LEVELS)}"))
        for key in ("share", "memory"):
            if not 0 < getattr(self, key) <= 1:
                found.append(Problem(f"preflight.{key}", getattr(self, key), "a share in (0, 1]"))
        for key in ("clock_s", "compute_s", "links_mb", "disk_mb"):
            if getattr(self, key) <= 0:
                found.append(Problem(f"preflight.{key}", getattr(self, key), "must be above 0"))
        for key in ("disk_mb_s", "disk_room"):
            if getattr(self, key) < 0:
                found.append(Problem(f"preflight.{key}", getattr(self, key), "must be at least 0"))
        return found

    def run(self, config: "RunConfig", start: "Start", directory: Path, world: World) -> None:
        """Measure and judge; all ranks together. A machine that is only slow is told, unless the level is "full".

        Raises:
            PreflightError: names every machine that is not fit, and every input.
            SystemExit: the same, on all ranks but the first.
        """
        if self.level == "off":
            return
        records = self.measure(config, start, directory, world)
        with together():
            if world.rank == 0:
                self.insist(self.judge(records))

    def measure(
        self, config: "RunConfig", start: "Start | None", directory: Path, world: World, unread: str = ""
    ) -> list[Record]:
        """What all ranks found, on rank 0; nothing on the others.

        Args:
            config: of the run.
            start: what it starts from; None leaves inputs out.
            directory: the run directory, which exists.
            world: this process among the others.
            unread: why this rank could not read what the run starts from, where it could not.
        """
        dtype = compute_dtype(config.stage.precision, world.device)
        site = Site(config, self, start, directory, world, need_of(config, start, dtype), dtype)
        found = {name: value for name, check in CHECKS.items() if (value := check.measure(site)) is not None}
        if unread:
            found["inputs"] = {"problems": [unread], "fingerprints": {}}
        mine = Record(world.rank, host(), found)
        records: list[Record] | None = [mine] * world.size if world.rank == 0 else None
        dist.gather_object(mine, records)
        return records or []

    def judge(self, records: Sequence[Record]) -> list[Finding]:
        """Everything wrong, by check."""
        return [finding for check in CHECKS.values() for finding in check.judge(records, self)]

    def insist(self, findings: Sequence[Finding]) -> None:
        """Tell what is slow, and refuse what is not fit.

        Raises:
            PreflightError: see `run`.
        """
        bearable = [finding for finding in findings if finding.slow and not self.full]
        for finding in bearable[:SHOWN]:
            print(f"slow: {finding.text}", flush=True)
        lines = [f"{finding.check}: {finding.text}" for finding in findings if finding not in bearable]
        if lines:
            more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            raise PreflightError(
                "not fit for this run:\n  " + "\n  ".join(lines[:SHOWN] + more) + "\n"
                "Mend these, or leave the machines out. (preflight=off starts without looking.)"
            )
