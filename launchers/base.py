"""What a launcher does: it starts one stage as processes somewhere and says how they ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from conf.errors import LostError

DONE = 0
STOPPED_EARLY = 75
"""Stopped on request or preemption with a checkpoint written: start me again."""
LOST = LostError.exit_code
"""A rank, a machine or the network was lost, by no fault of the run: start me again while that brings it forward."""

Output = Callable[[int, str], None]
"""Called with the rank and one line it printed, without the line's end; from any thread."""


@dataclass(frozen=True)
class Ended:
    """How a stage's processes ended.

    Args:
        code: 0 all did; 75 they stopped early with a checkpoint; 76 a rank was killed or lost, and none failed; else
            the code of the rank that failed first.
        reason: in words, for a code that is neither.
    """

    code: int
    reason: str = ""


class Running(Protocol):
    """The processes of one stage."""

    def poll(self) -> Ended | None:
        """How they ended, or None while any is alive. Never waits."""
        ...

    def stop(self) -> None:
        """Ask them to write a checkpoint and exit 75."""
        ...

    def kill(self) -> None:
        """End them at once."""
        ...


class Launcher(Protocol):
    """Subclasses are frozen dataclasses registered with `@register("launcher", name)`."""

    def start(self, command: Sequence[str], processes: int, output: Output) -> Running:
        """Start `python -m <command>` on `processes` ranks that find each other as under torchrun (RANK, WORLD_SIZE,
        LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""
        ...


@dataclass(frozen=True)
class Ahead:
    """A stage that is to run once others have.

    Args:
        name: the stage's.
        directory: its run directory.
        command: what follows `python -m`.
        processes: ranks.
        after: names of the stages that must have ended well first.
        always: it is enough that they have ended.
    """

    name: str
    directory: Path
    command: Sequence[str]
    processes: int
    after: Sequence[str]
    always: bool


@runtime_checkable
class Queue(Launcher, Protocol):
    """A launcher that has a queue of its own, which waits for stages in our place. Where a stage was put into it
    ahead, `start` joins what is there."""

    @property
    def detach(self) -> bool:
        """Leave once the stages are in the queue."""
        ...

    def ahead(self, stages: Sequence[Ahead]) -> dict[str, str]:
        """Put stages into the queue, each behind those it needs; none that is there already. Returns what the queue
        calls each."""
        ...

    def end(self, directory: Path, now: bool = False) -> None:
        """Have what waits or runs for a run directory end, with a checkpoint where it runs, or as it is. Does not wait
        for it."""
        ...

    def together(self, name: str, stages: Sequence[Ahead], at_once: int) -> str:
        """Put stages into the queue that wait for no other, as one job with an element for each; none that is there
        already. Returns what the queue calls it; an empty text where all were there.

        Args:
            at_once: elements that may run at the same time.
        """
        ...

    def withdraw(self, now: bool) -> None:
        """Take the stages out of the queue that were put into it and not started by this process. Those that already
        run are asked to write a checkpoint and end.

        Args:
            now: end those as they are.
        """
        ...
