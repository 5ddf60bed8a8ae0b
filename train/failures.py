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
    """

    rendezvous_s: float = 300.0
    collective_s: float = 600.0
    patience_s: float = PATIENCE_S
    lease_s: float = STALE_S

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range."""
        return [
            Problem(f"failures.{key}", value, "a number of seconds above 0")
            for key, value in {**self.limits, "lease_s": self.lease_s}.items()
            if value <= 0
        ]

    @property
    def limits(self) -> dict[str, float]:
        """Of `parallel.distributed.joined`."""
        return {name: getattr(self, name) for name in ("rendezvous_s", "collective_s", "patience_s")}
