"""Whether what was cut is started again: as long as that brings it forward."""

from dataclasses import dataclass, field
from pathlib import Path

from conf.checkpoints import steps


def newest_step(checkpoints: Path) -> int:
    """The step of the newest committed checkpoint; -1 without one."""
    return max(steps(checkpoints), default=-1)


@dataclass
class Restarts:
    """The restarts of one run. A new checkpoint pays for those before it, also one that comes after the newest was set
    aside as damaged.

    Args:
        checkpoints: the run's directory of them.
        limit: restarts in a row without a new one in between.
        count: restarts so far.
    """

    checkpoints: Path
    limit: int
    count: int = 0
    in_vain: int = field(default=0, init=False)
    """Restarts since the newest checkpoint."""
    newest: int = field(init=False)

    def __post_init__(self) -> None:
        self.newest = newest_step(self.checkpoints)

    def another(self) -> bool:
        """Take one more restart, if there is one left."""
        if (newest := newest_step(self.checkpoints)) != self.newest:
            self.newest, self.in_vain = newest, 0
        if self.in_vain >= self.limit:
            return False
        self.in_vain += 1
        self.count += 1
        return True

    @property
    def starts(self) -> str:
        """In words, for the one that may not be started again."""
        times = self.in_vain + 1
        return f"{times} time{'s' * (times > 1)} without a new checkpoint in between"
