"""What a run bears before it ends: how long others may be silent, what is tried again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import Problem
from data_pipeline.lease import STALE_S
from parallel.watch import PATIENCE_S

if TYPE_CHECKING:
    from train.config import RunConfig


@dataclass(frozen=True)
class Failures:
    """When other ranks are given up, and what is tried again. None of it changes what is trained.

    Args:
        rendezvous_s: seconds that a rank waits at the start for the others.
        collective_s: seconds after which a collective that not all ranks come to is given up; who did not come is then
            found within seconds. More than the slowest of what one rank does alone: compiling, a save.
        patience_s: seconds without a sign of life after which a rank is gone. More than anything that holds Python's
            interpreter.
        lease_s: seconds after which a run on another machine may go on in run_dir, where rank 0 gives no sign there. It
            gives six in that time.
        straggler: a rank is named that is slower than so many times the median of those that do the same work; above 1,
            or 0 to name none.
        straggler_every: steps after which one is looked at; the median of three looks counts.
        save_retries: checkpoints in a row that may fail to be written: the run goes on to the next one that is due; its
            last one is tried again at once.
        read_retries: times that reading a step's samples is tried again after an I/O error, after 1 s, 2 s, 4 s, ...
        rebuilds: times that the ranks, where a collective broke although all came to it and live, go back to the newest
            checkpoint within their processes. Not on CUDA, whose communicators do not survive that.
    """

    rendezvous_s: float = 300.0
    collective_s: float = 600.0
    patience_s: float = PATIENCE_S
    lease_s: float = STALE_S
    straggler: float = 1.5
    straggler_every: int = 100
    save_retries: int = 2
    read_retries: int = 3
    rebuilds: int = 3

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range."""
        seconds = {**self.limits, "lease_s": self.lease_s}
        counts = {name: getattr(self, name) for name in ("save_retries", "read_retries", "rebuilds")}
        wrong = {name: "a number of seconds above 0" for name, value in seconds.items() if value <= 0}
        wrong |= {name: "0 or more" for name, count in counts.items() if count < 0}
        if self.straggler != 0 and self.straggler <= 1:
            wrong["straggler"] = "above 1, or 0 to name no rank"
        if self.straggler_every < 1:
            wrong["straggler_every"] = "at least 1 step"
        return [Problem(f"failures.{name}", getattr(self, name), fix) for name, fix in wrong.items()]

    @property
    def limits(self) -> dict[str, float]:
        """Of `parallel.distributed.joined`."""
        return {name: getattr(self, name) for name in ("rendezvous_s", "collective_s", "patience_s")}
