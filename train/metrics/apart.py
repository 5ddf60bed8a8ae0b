"""A sink in a thread of its own, behind a bounded queue: it may be slow, hang or die, and the run does not notice."""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.metrics.base import Logger, Run

CAPACITY = 4096
"""Most calls that wait for a sink. Beyond, figures are dropped and counted; alerts and the end are not."""


class Apart:
    """Passes calls on to a sink that one thread opens, uses and closes. No call waits.

    Args:
        name: of the logger, for messages.
        logger: opens the sink.
        run: what is recorded.
        failed: called with the name and the error when the sink raises, which ends it.
    """

    def __init__(self, name: str, logger: "Logger", run: "Run", failed: Callable[[str, Exception], None]):
        self.name = name
        self.dropped = 0
        """Figures that the sink was too slow for."""
        self.opened, self.ended = threading.Event(), threading.Event()
        self._failed = failed
        self._waiting: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._change = threading.Condition()
        threading.Thread(target=self._run, args=(logger, run), name=f"logger {name}", daemon=True).start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._ask("log", step, dict(values))

    def system(self, step: int, values: Mapping[str, float]) -> None:
        self._ask("system", step, dict(values))

    def alert(self, kind: str, text: str) -> None:
        self._ask("alert", kind, text)

    def artifact(self, artifact: Any) -> None:
        self._ask("artifact", artifact)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Asks for the end; `ended` tells when it is there."""
        if self.dropped:
            warnings.warn(f"logger {self.name} was too slow: {self.dropped} lines are missing there", stacklevel=4)
        self._ask("close", dict(summary))

    def _ask(self, what: str, *given: Any) -> None:
        with self._change:
            dropped = len(self._waiting) >= CAPACITY and what in ("log", "system")
            if dropped:
                self.dropped += 1
            else:
                self._waiting.append((what, given))
                self._change.notify()
        if dropped and self.dropped == 1:
            warnings.warn(f"logger {self.name} does not keep up with the run: lines are left out", stacklevel=4)

    def _run(self, logger: "Logger", run: "Run") -> None:
        try:
            sink = logger.open(run)
            self.opened.set()
            what = ""
            while what != "close":
                with self._change:
                    self._change.wait_for(lambda: self._waiting)
                    what, given = self._waiting.popleft()
                if hasattr(sink, what):
                    getattr(sink, what)(*given)
        except Exception as error:  # noqa: BLE001  whatever it is, it is the tracker's own affair
            self._failed(self.name, error)
        finally:
            self.opened.set()
            self.ended.set()
