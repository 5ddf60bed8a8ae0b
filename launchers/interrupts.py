"""Requests to stop: Ctrl-C at the terminal, the scheduler's SIGTERM."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from launchers.base import Launcher, Queue, Running

KILLED = 128 + signal.SIGINT
"""Exit code after a second request, which ends what runs at once."""


def pass_on(launcher: Launcher, running: Iterable[Running], now: bool) -> None:
    """Have what was started, and what waits in a queue, end: with a checkpoint, or at once."""
    if isinstance(launcher, Queue):
        launcher.withdraw(now)
    for processes in running:
        if now:
            processes.kill()
        else:
            processes.stop()


@contextmanager
def heeded(handle: Callable[[], None]) -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM call `handle`."""

    def note(number: int, frame: FrameType | None) -> None:
        handle()

    earlier = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
