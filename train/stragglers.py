"""A rank that is slower than those that do the same work is named: all others wait for it in every step.

What is compared is a rank's own time of a step: waiting for a batch, and the step without the time in which a
collective was under way and nothing was computed, as the profiler saw it. Now and then a step is profiled on all ranks;
the times are gathered beside the next one. Ranks of one pipeline stage are compared with each other.
"""

import socket
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LOOKS = 3
"""The window: a slow rank is slow in the median of so many looks."""


@dataclass(frozen=True)
class Slow:
    """One straggler.

    Args:
        rank: which.
        own_s: its own seconds per step, in the median of the looks.
        ratio: to those of the median rank among its peers.
    """

    rank: int
    own_s: float
    ratio: float


def slow(looks: Sequence[Sequence[float]], stages: int, factor: float) -> list[Slow]:
    """The ranks whose own time is over `factor` times that of the median of their peers.

    Args:
        looks: seconds of each rank, one look after the other.
        stages: pipeline stages; a stage's ranks are next to each other.
    """
    own_s = [statistics.median(times) for times in zip(*looks, strict=True)]
    peers = len(own_s) // stages
    found = []
    for rank, seconds in enumerate(own_s):
        first = rank // peers * peers
        usual = statistics.median_low(own_s[first : first + peers])  # of two ranks the faster one
        if seconds > factor * usual:
            found.append(Slow(rank, seconds, seconds / usual))
    return found


class Stragglers:
    """Gathers the ranks' times, and names each slow one once, until it is well again. All ranks make it together.

    Args:
        factor: see `failures.straggler`.
        stages: pipeline stages.
        group: of all ranks, for small tensors.
    """

    def __init__(self, factor: float, stages: int, group: dist.ProcessGroup):
        self.factor, self.stages, self._group = factor, stages, group
        self._size = dist.get_world_size()
        self._hosts: list[str] = [""] * self._size
        dist.all_gather_object(self._hosts, socket.gethostname(), group=group)
        self._looks: deque[list[float]] = deque(maxlen=LOOKS)
        self._named: set[int] = set()
        self._pending: tuple[list[Tensor], dist.Work] | None = None

    def look(self, own_s: float) -> None:
        """Begin to gather; every rank at the same step."""
        times = [torch.zeros(1, dtype=torch.float64) for _ in range(self._size)]
        work = dist.all_gather(times, torch.tensor([own_s], dtype=torch.float64), group=self._group, async_op=True)
        assert work is not None
        self._pending = times, work

    def read(self) -> list[str]:
        """What is to be said of ranks that have become slow, once a look was gathered."""
        if self._pending is None:
            return []
        (times, work), self._pending = self._pending, None
        work.wait()
        self._looks.append([float(time) for time in times])
        if len(self._looks) < LOOKS:
            return []
        found = slow(self._looks, self.stages, self.factor)
        new = [one for one in found if one.rank not in self._named]
        self._named = {one.rank for one in found}
        return [
            f"rank {one.rank} of {self._size} (on {self._hosts[one.rank]}) is slow: {one.own_s:.3g} s of a step are "
            f"its own, {one.ratio:.1f} times those of the median of its peers; all others wait for it"
            for one in new
        ]
