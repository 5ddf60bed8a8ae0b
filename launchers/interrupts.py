"""Requests to stop: Ctrl-C at the terminal, the scheduler's SIGTERM."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

KILLED = 128 + signal.SIGINT
"""Exit code after a second request, which ends what runs at once."""


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
