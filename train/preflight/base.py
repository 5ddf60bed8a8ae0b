"""What a check is: every rank measures, the first one judges what all have found.

A check is a module with two functions. `measure(site)` runs on every rank together and returns what this one found, in
plain values: it goes into the report. `judge(records, limits)` is a function of these alone, so that a cluster of
thousands can be judged in a test.
"""

import socket
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import torch

from parallel.distributed import World
from parallel.verdict import spans

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.preflight.limits import Preflight
    from train.preflight.memory import Need
    from train.start import Start


@dataclass(frozen=True)
class Site:
    """What a check may look at.

    Args:
        config: of the run.
        limits: what is asked for.
        start: tokenizer, architecture and weights; None where nothing is known of them.
        directory: the run directory.
        world: this process among the others.
        need: bytes that the run will take.
        dtype: what is computed with.
    """

    config: "RunConfig"
    limits: "Preflight"
    start: "Start | None"
    directory: Path
    world: World
    need: "Need"
    dtype: torch.dtype

    @property
    def leads(self) -> bool:
        """Whether this process looks at its machine's disks for all that run there."""
        return self.world.local_rank == 0


@dataclass(frozen=True)
class Record:
    """What one rank found.

    Args:
        rank: which.
        host: its machine.
        found: by check; a check that had nothing to measure on this rank is absent.
    """

    rank: int
    host: str
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Args:
        check: who says so.
        ranks: which are concerned.
        text: the machine, what was found there, what was expected.
        slow: it would only take longer: the run goes on unless the level is "full".
    """

    check: str
    ranks: list[int]
    text: str
    slow: bool = False


class Check(Protocol):
    """One of the modules of this package."""

    def measure(self, site: Site) -> Any: ...

    def judge(self, records: Sequence[Record], limits: "Preflight") -> list[Finding]: ...


def host() -> str:
    return socket.gethostname()


def by_host(records: Sequence[Record]) -> dict[str, list[Record]]:
    """In the order of the ranks."""
    hosts: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        hosts[record.host].append(record)
    return hosts


def who(records: Sequence[Record]) -> str:
    """The machines and ranks of some records."""
    hosts = sorted({record.host for record in records})
    return f"{', '.join(hosts)} (rank {spans(record.rank for record in records)})"


def slower(values: dict[int, float], share: float) -> tuple[dict[int, float], float]:
    """Those that have less than a share of the median, and the median. Half of the values decide what is usual, so one
    that is slow cannot hide, nor make others look fast."""
    if not values:
        return {}, 0.0
    usual = median(values.values())
    return {rank: value for rank, value in values.items() if value < share * usual}, usual


def slow_ranks(
    check: str, records: Sequence[Record], values: dict[int, float], share: float, say: Callable[[float, float], str]
) -> list[Finding]:
    """A finding for each machine that has ranks below a share of the median.

    Args:
        check: who says so.
        records: of all ranks.
        values: of ranks.
        share: of the median; see above.
        say: from a value and the median to words.
    """
    behind, usual = slower(values, share)
    found = []
    for there in by_host([record for record in records if record.rank in behind]).values():
        worst = min(behind[record.rank] for record in there)
        ranks = [record.rank for record in there]
        found.append(Finding(check, ranks, f"{who(there)}: {say(worst, usual)}", slow=True))
    return found
