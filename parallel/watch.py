"""A rank that dies, hangs or fails is named by the others, soon, and all end.

A thread of each rank writes a sign of life to the store every second and looks at that of the next rank. What is found
out goes under one key, which all look at: the first finding holds.

    it failed                        it says so itself
    killed, suspended, machine lost  its signs stop: for PATIENCE_S, or for SUSPICION_S where a connection broke as well
    it hangs                         its signs go on, but the others ran into the time limit of a collective and it did
                                     not; it prints where it stands

Silence is counted in looks, not in seconds: a rank that was itself suspended accuses nobody when it wakes. A rank that
is only slow (it compiles, loads, saves) goes on with its signs, which need nothing but a moment of the interpreter.
"""

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from conf.errors import LongrunError, LostError

BEAT_S = 1.0
"""Between two signs."""
PATIENCE_S = 60.0
"""Without a sign for so long, a rank is gone. Nothing holds the interpreter for nearly as long."""
SUSPICION_S = 5.0
"""The same, once a connection has broken."""
GRACE_S = 5.0
"""A rank that knows what happened has so long to end by itself, with its own message."""

HERE, HURT, LEFT = "here", "hurt", "left"
"""States of a rank: at work; thrown out by a collective that broke or came too late; gone as it should."""

VERDICT = "verdict"
BROKEN = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|remote process exited", re.IGNORECASE
)
"""What the transports say when it is another rank's fault."""


class PeerError(LostError):
    """Another rank died or hangs; the message names it."""


class PeerFailedError(LongrunError):
    """Another rank failed, by an error of its own; the message has its reason. The same command would fail again."""


@dataclass(frozen=True)
class Sign:
    """The last that a rank has said of itself.

    Args:
        host: its machine.
        state: HERE, HURT or LEFT.
        step: the last step that it has finished.
        count: number of the sign.
    """

    host: str = "unknown"
    state: str = HERE
    step: int = 0
    count: int = 0


@dataclass(frozen=True)
class Verdict:
    """Whose fault it is.

    Args:
        ranks: those at fault.
        text: the message.
        lost: whether they are gone or hang; else one of them failed.
    """

    ranks: list[int]
    text: str
    lost: bool = True

    @property
    def error(self) -> LongrunError:
        """For the other ranks."""
        return PeerError(self.text) if self.lost else PeerFailedError(self.text)


class Watch:
    """One rank's thread, from the first collective of a run to its last.

    Args:
        store: a connection that nobody else uses: a wait on it would hold up the signs.
        rank: this rank.
        size: number of ranks.
        server: who serves the store, as a message calls it.
        serves: whether it is this rank, which then leaves last.
        patience_s: see PATIENCE_S.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        server: str,
        serves: bool,
        patience_s: float = PATIENCE_S,
    ):
        self.store, self.rank, self.size = store, rank, size
        self.server, self.serves, self.patience_s = server, serves, patience_s
        self.step = 0
        """The last step that this rank has finished."""
        self._host, self._state, self._count = socket.gethostname(), HERE, 0
        self._next = rank
        self._seen = Sign()
        self._silence = 0
        self._survey: tuple[int, dict[int, Sign]] | None = None
        self._verdict: Verdict | None = None
        self._told, self._closing = threading.Event(), threading.Event()
        self._say()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def blame(self, error: BaseException) -> LongrunError | None:
        """The error that took this rank out of the run, as another rank's fault. None where it is its own, of which the
        others are told; or where nobody is found, after a few times SUSPICION_S."""
        if _broken(error):
            self._state = HURT
            self._told.wait(4 * SUSPICION_S)
            return self._verdict.error if self._verdict else None
        if not isinstance(error, SystemExit):  # another rank's error, which it reports, or none
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            where = _who({self.rank: Sign(self._host)}, self.size)
            lost = isinstance(error, LostError)
            self._publish(Verdict([self.rank], f"{where} failed at step {self.step}: {said}", lost))
        return None

    def close(self) -> None:
        """Leave the run. The rank that serves the store waits a little for the others, who still look into it."""
        self._closing.set()
        self._thread.join(SUSPICION_S)
        self._state = LEFT
        deadline = time.monotonic() + GRACE_S + 2 * BEAT_S
        try:
            self._say()
            while self.serves and self._others_present() and time.monotonic() < deadline:
                time.sleep(BEAT_S / 20)
        except dist.DistError:
            return  # the store went first: there is nobody left to tell

    def _others_present(self) -> bool:
        gone = self._verdict.ranks if self._verdict else []
        return any(sign.state != LEFT for rank, sign in self._signs().items() if rank not in gone)

    def _run(self) -> None:
        while not self._closing.wait(BEAT_S):
            try:
                self._say()
                self._verdict = self._published() or self._found()
            except dist.DistError as error:
                reason = str(error).splitlines()[0]
                self._verdict = Verdict(
                    [], f"{self.server} is gone: it does not answer ({reason}). Look at its output."
                )
            if self._verdict:
                self._told.set()
                if not self._closing.wait(GRACE_S):
                    self._end(self._verdict)
                return

    def _end(self, verdict: Verdict) -> None:
        """The main thread waits in a collective that never comes to its end."""
        sys.stdout.flush()
        print(f"[rank {self.rank}] error: {verdict.text}", file=sys.stderr, flush=True)
        if self.rank in verdict.ranks:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        os._exit(verdict.error.exit_code)

    def _say(self) -> None:
        self._count += 1
        sign = Sign(self._host, self._state, self.step, self._count)
        self.store.set(str(self.rank), json.dumps(asdict(sign)))

    def _sign(self, rank: int) -> Sign:
        """The first one may not be there yet."""
        return Sign(**json.loads(self.store.get(str(rank)))) if self.store.check([str(rank)]) else Sign()

    def _signs(self) -> dict[int, Sign]:
        """Of all other ranks."""
        return {rank: self._sign(rank) for rank in range(self.size) if rank != self.rank}

    def _published(self) -> Verdict | None:
        return Verdict(**json.loads(self.store.get(VERDICT))) if self.store.check([VERDICT]) else None

    def _publish(self, verdict: Verdict) -> Verdict:
        """Answers with the verdict that was there first."""
        return Verdict(**json.loads(self.store.compare_set(VERDICT, "", json.dumps(asdict(verdict)))))

    def _found(self) -> Verdict | None:
        """Look at the next rank; where it is silent, or a collective broke, at all of them twice."""
        sign = self._sign(self._next) if self._next != self.rank else Sign(state=LEFT)
        self._silence = self._silence + 1 if sign == self._seen else 0
        self._seen = sign
        if sign.state == LEFT:
            self._next = (self._next + 1) % self.size
            self._silence = 0
        if self._survey is None:
            if self._state == HURT or self._silence * BEAT_S >= self.patience_s:
                self._survey = self._count, self._signs()
            return None
        began, before = self._survey
        if (self._count - began) * BEAT_S < SUSPICION_S:
            return None
        self._survey = None
        found = _judge(before, self._signs(), self.size)
        if found is None and self._state == HURT:
            self._told.set()
        return self._publish(found) if found else None


def _judge(before: dict[int, Sign], now: dict[int, Sign], size: int) -> Verdict | None:
    """Two looks, SUSPICION_S apart."""
    present = {rank: sign for rank, sign in now.items() if sign.state != LEFT}
    silent = {rank: sign for rank, sign in present.items() if sign == before[rank]}
    left = {rank: sign for rank, sign in now.items() if sign.state == LEFT}
    waited_for = {rank: sign for rank, sign in present.items() if sign.state == HERE}
    if silent:
        fault, what = silent, "is gone: no sign of life since step {}. Was it killed, is its machine up, had it memory?"
    elif left:
        fault, what = left, "left the run after step {}, and the others did not."
    elif waited_for:
        fault, what = waited_for, "hangs: it lives, but did not come to a collective after step {}."
    else:
        return None
    steps = sorted({sign.step for sign in fault.values()})
    text = f"{_who(fault, size)} {what.format(' and '.join(map(str, steps)))} Look at the end of its output."
    return Verdict(sorted(fault), text)


def _who(ranks: dict[int, Sign], size: int) -> str:
    hosts = sorted({sign.host for sign in ranks.values()})
    return f"rank {spans(ranks)} of {size} (on {', '.join(hosts)})"


def spans(ranks: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and found[-1][1] == rank - 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _broken(error: BaseException) -> bool:
    """Whether an error comes, in the end, from a collective that another rank broke."""
    return any(
        (isinstance(link, dist.DistError) or "gloo" in str(link)) and BROKEN.search(str(link)) for link in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
