"""A rank that dies, hangs or fails is named by the others, soon, and all end.

A thread of each rank writes a sign of life to the store every second and looks at that of the next rank. What is found
out goes under one key, which all look at: the first finding holds.

    it failed                        it says so itself
    killed, suspended, machine lost  its signs stop: for PATIENCE_S, or for SUSPICION_S where a connection broke as well
    it hangs                         its signs go on, but the others ran into the time limit of a collective and it did
                                     not
    it skipped a collective          all ran into the limit, but not in the same collective
    it holds the interpreter         its signs stop, but its stack comes from a thread that does not need Python

Then every rank writes where it stands: its stacks into a file, what it waits for to the store, and the first that can
gather it prints who stands where.

Silence is counted in looks, not in seconds: a rank that was itself suspended accuses nobody when it wakes. A rank that
is only slow (it compiles, loads, saves) goes on with its signs, which need nothing but a moment of the interpreter.

Of all ranks that were thrown out of a collective one looks into it, in requests that take all ranks at once: that is as
quick with thousands of them. Where it goes silent itself, another one takes its place.
"""

import contextlib
import faulthandler
import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from conf.errors import LongrunError, LostError
from parallel.standing import Standing, write_stacks
from parallel.verdict import HERE, HURT, LEFT, PeerError, Sign, Verdict, file_of, has_written, judge, table, who

BEAT_S = 1.0
"""Between two signs."""
PATIENCE_S = 60.0
"""Without a sign for so long, a rank is gone. Nothing holds the interpreter for nearly as long."""
SUSPICION_S = 5.0
"""The same, once a connection has broken."""
GRACE_S = 5.0
"""A rank that knows what happened has so long to end by itself, with its own message."""

HELD_S = 20.0
"""Nothing that is well holds the interpreter for so long."""
GATHER_S = 3.0
"""How long the others' standings are waited for."""

VERDICT, SURVEYOR, GATHERER = "verdict", "surveyor", "gatherer"
BROKEN = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|remote process exited", re.IGNORECASE
)
"""What the transports say when it is another rank's fault."""


@dataclass
class _Watched:
    """A rank that is looked at again and again.

    Args:
        rank: which.
        sign: its last one.
        silence: looks in a row that found no new one.
    """

    rank: int
    sign: Sign = field(default_factory=Sign)
    silence: int = 0

    def look(self, sign: Sign) -> None:
        self.silence = self.silence + 1 if sign == self.sign else 0
        self.sign = sign


class Watch:
    """One rank's thread, from the first collective of a run to its last.

    Args:
        store: a connection that nobody else uses: a wait on it would hold up the signs.
        rank: this rank.
        size: number of ranks.
        server: who serves the store, as a message calls it.
        serves: whether it is this rank, which then leaves last.
        patience_s: see PATIENCE_S.
        collective_s: how long this rank waits for its device before it counts as thrown out of a collective there: one
            that waits for another rank on a GPU throws nothing.
        leaving_s: where a collective broke though all ranks live, how long this rank has to leave by itself, with what
            it must close: all of them may meet again.
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
        collective_s: float = math.inf,
        leaving_s: float = GRACE_S,
    ):
        self.store, self.rank, self.size = store, rank, size
        self.server, self.serves, self.patience_s = server, serves, patience_s
        self.collective_s, self.leaving_s = collective_s, leaving_s
        self.step = 0
        """The last step that this rank has finished."""
        self.waits_since: float | None = None
        """Since when the main thread waits for the device, by the monotonic clock."""
        self.stacks: Path | None = None
        """See `keep_stacks`."""
        self._host, self._state, self._count = socket.gethostname(), HERE, 0
        self._standing: Standing | None = None
        self._others = [other for other in range(size) if other != rank]
        self._next = _Watched((rank + 1) % size)
        self._surveyor: _Watched | None = None
        self._survey: tuple[int, dict[int, Sign]] | None = None
        self._verdict: Verdict | None = None
        self._thrown: BaseException | None = None
        self._stream: TextIO | None = None
        self._told, self._closing = threading.Event(), threading.Event()
        self._say()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def keep_stacks(self, directory: Path) -> None:
        """Where each rank writes what it stood at when the run was lost; until then, who is at fault prints it. The
        file is opened beforehand: who holds the interpreter cannot. Where it cannot be, stacks go to the output."""
        self.stacks = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._stream = open(file_of(directory, self.rank), "a")  # noqa: SIM115  closed by close()
        except OSError as error:
            print(f"[rank {self.rank}] no stacks are kept in {directory}: {error}", file=sys.stderr, flush=True)
            self._stream = open(os.dup(2), "w")  # noqa: SIM115

    def blame(self, error: BaseException) -> LongrunError | None:
        """The error that took this rank out of the run, as another rank's fault, once that is found out. None where it
        is its own, of which the others are told."""
        self.note(error)
        if self._state == HURT:
            while not self._told.wait(BEAT_S) and self._thread.is_alive():
                pass
            said = f"a collective broke after step {self.step}, and whose fault it was is not known: {error}"
            return self._verdict.error if self._verdict else PeerError(said)
        if not isinstance(error, SystemExit):  # another rank's error, which it reports, or none
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            where = who({self.rank: Sign(self._host)}, self.size)
            kind = "lost" if getattr(error, "exit_code", None) == LostError.exit_code else "failed"
            self._publish(Verdict([self.rank], f"{where} failed at step {self.step}: {said}", kind))
        return None

    def note(self, error: BaseException) -> None:
        """Whether a collective that broke threw this rank out: then it looks for who is at fault."""
        if self._state == HERE and _broken(error):
            self._standing, self._thrown, self._state = Standing.here(error), error, HURT

    def close(self) -> None:
        """Leave the run. The rank that serves the store waits a little for the others, who still look into it."""
        self._closing.set()
        self._thread.join(SUSPICION_S)
        self._disarm()
        self._state = LEFT
        deadline = time.monotonic() + GRACE_S + 2 * BEAT_S
        try:
            self.store.compare_set(SURVEYOR, str(self.rank), "")
            self._say()
            gone = self._verdict.ranks if self._verdict else []
            present = [rank for rank in self._others if rank not in gone] if self.serves else []
            while present and time.monotonic() < deadline:
                present = [rank for rank, sign in self._signs(present).items() if sign.state != LEFT]
                time.sleep(BEAT_S / 20)
        except dist.DistError:
            return  # the store went first: there is nobody left to tell

    def _run(self) -> None:
        while not self._closing.wait(BEAT_S):
            self._arm()
            self._look_at_device()
            try:
                self._say()
                self._verdict = self._published() or self._found()
                if self._verdict and self._verdict.kind != "failed":
                    self._write()
                    self._gather(self._verdict)
            except dist.DistError as error:
                reason = str(error).splitlines()[0]
                self._verdict = Verdict(
                    [], f"{self.server} is gone: it does not answer ({reason}). Look at its output."
                )
                self._write()
            if self._verdict:
                self._told.set()
                grace_s = self.leaving_s if self._verdict.kind == "broken" else GRACE_S
                if not self._closing.wait(min(grace_s, threading.TIMEOUT_MAX)):
                    self._end(self._verdict)
                return

    def _end(self, verdict: Verdict) -> None:
        """The main thread waits in a collective that never comes to its end."""
        sys.stdout.flush()
        print(f"[rank {self.rank}] error: {verdict.text}", file=sys.stderr, flush=True)
        if self.rank in verdict.ranks and self.stacks is None:
            write_stacks(sys.__stderr__ or sys.stderr)
        os._exit(verdict.error.exit_code)

    def _gather(self, verdict: Verdict) -> None:
        """Write where this rank stands; the first one to come here tells where all do."""
        self._standing = self._standing or Standing.here()
        self._say()
        if self.store.compare_set(GATHERER, "", str(self.rank)).decode() != str(self.rank):
            return
        deadline = time.monotonic() + GATHER_S
        standings: dict[int, Standing] = {}
        able = self.size - (len(verdict.ranks) if verdict.kind == "gone" else 0)
        while len(standings) < able and time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)
            signs = self._signs(rank for rank in range(self.size) if rank not in standings)
            standings |= {rank: sign.standing for rank, sign in signs.items() if sign.standing}
        stood = table(standings, self.size)
        print(f"where the ranks stood:\n{stood}", file=sys.stderr, flush=True)
        if self.stacks is not None:
            with contextlib.suppress(OSError):
                (self.stacks / "ranks.txt").write_text(f"{verdict.text}\n{stood}\n")

    def _write(self) -> None:
        if self.stacks is None:
            return
        try:
            with open(file_of(self.stacks, self.rank), "a") as stream:
                write_stacks(stream, self._thrown)
        except OSError:
            write_stacks(sys.__stderr__ or sys.stderr, self._thrown)

    def _look_at_device(self) -> None:
        since = self.waits_since
        if self._state == HERE and since is not None and time.monotonic() - since > self.collective_s:
            self._standing, self._state = Standing.here(), HURT

    def _arm(self) -> None:
        """Should something hold the interpreter, so that this thread does not come round, faulthandler's own writes the
        stacks: that one needs no interpreter."""
        if self._stream is not None:
            faulthandler.dump_traceback_later(min(HELD_S, self.patience_s / 2), file=self._stream)

    def _disarm(self) -> None:
        """Leave no empty file behind."""
        if self._stream is not None and self.stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):
                self._stream.close()
                if not has_written(self.stacks, self.rank):
                    file_of(self.stacks, self.rank).unlink(missing_ok=True)
                    self.stacks.rmdir()
                    self.stacks.parent.rmdir()

    def _say(self) -> None:
        self._count += 1
        self.store.set(str(self.rank), json.dumps(asdict(self._own())))

    def _own(self) -> Sign:
        return Sign(self._host, self._state, self.step, self._count, self._standing)

    def _signs(self, ranks: Iterable[int]) -> dict[int, Sign]:
        """The first ones may not be there yet."""
        keys = [str(rank) for rank in ranks]
        said = keys if self.store.check(keys) else [key for key in keys if self.store.check([key])]
        signs = {int(key): Sign() for key in keys}
        return signs | {int(key): Sign.read(text.decode()) for key, text in self._read(said).items()}

    def _read(self, keys: list[str]) -> dict[str, bytes]:
        return dict(zip(keys, self.store.multi_get(keys), strict=True)) if keys else {}

    def _published(self) -> Verdict | None:
        return Verdict(**json.loads(self.store.get(VERDICT))) if self.store.check([VERDICT]) else None

    def _publish(self, verdict: Verdict) -> Verdict:
        """Answers with the verdict that was there first."""
        return Verdict(**json.loads(self.store.compare_set(VERDICT, "", json.dumps(asdict(verdict)))))

    def _found(self) -> Verdict | None:
        """Look at the next rank; where it is silent, or a collective broke, at all of them twice."""
        self._look_at(self._next)
        if self._next.sign.state == LEFT:
            self._next = _Watched((self._next.rank + 1) % self.size)
        if self._survey is None:
            silent = self._next.silence * BEAT_S >= self.patience_s
            if (self._state == HURT or silent) and self._surveys():
                self._survey = self._count, self._signs(self._others)
            return None
        began, before = self._survey
        if (self._count - began) * BEAT_S < SUSPICION_S:
            return None
        self._survey = None
        found = judge(before, self._signs(self._others), (self.rank, self._own()), self.size, self.stacks)
        if found is None:
            self.store.compare_set(SURVEYOR, str(self.rank), "")
        return self._publish(found) if found else None

    def _surveys(self) -> bool:
        """Whether it is this rank that looks into it: another one does, unless it is silent."""
        surveyor = int(self.store.compare_set(SURVEYOR, "", str(self.rank)))
        if self._surveyor is None or self._surveyor.rank != surveyor:
            self._surveyor = _Watched(surveyor)
        if surveyor != self.rank:
            self._look_at(self._surveyor)
            if self._surveyor.silence * BEAT_S >= SUSPICION_S:
                surveyor = int(self.store.compare_set(SURVEYOR, str(surveyor), str(self.rank)))
        return surveyor == self.rank

    def _look_at(self, watched: _Watched) -> None:
        if watched.rank != self.rank:
            key = str(watched.rank)
            said = [key] if watched.sign.count or self.store.check([key]) else []
            watched.look(Sign.read(self._read(said)[key].decode()) if said else Sign())


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
