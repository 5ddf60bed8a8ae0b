"""Goodput: the share of a run's wall time that went into training steps that are part of its result.

Every attempt (one start of the processes) keeps a record, `attempts/<number>.json` in the run directory, rewritten
while it is under way, so that of one that is killed no more than the last WRITTEN_S are missing. Together they account
for the wall time of a run, over all its restarts:

    useful     data, compute, communication: of steps that are kept
    overhead   init (interpreter and imports included), preflight, checkpoint (stall), evaluation, guard, profile (what
               it saw of one step), publish (the model, the manifest, closing)
    lost       lost: steps that were trained again, or would have to be; skipped: steps that changed nothing;
               down: from the last sign of life of an attempt to the start of the next one

Goodput = useful seconds / wall time since the first attempt began: useful new steps over elapsed time, as the Gemini
Team 2023 (arXiv:2312.11805) counts; the effective training time ratio of Kokolis et al. 2024 (arXiv:2410.21680) without
the first queue; the runtime goodput of Wongpanich et al. 2025 (arXiv:2502.06982), whose program goodput is about the
MFU of train.throughput.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import torch

from conf.errors import LongrunError
from data_pipeline.artifact import write_atomically
from train.progress import Progress
from train.throughput import Clock

DIRECTORY = "attempts"
WRITTEN_S = 1.0
"""Between two writes of a record."""
CLOSING_S = 10.0
"""So long a run waits, at its end, for a file system to take the last one."""

USEFUL = ("compute", "communication", "data")
OVERHEAD = ("init", "preflight", "checkpoint", "evaluation", "guard", "profile", "publish")
LOST = ("lost", "skipped", "down")


@dataclass
class Attempt:
    """One start of a run's processes, as its first rank records it.

    Args:
        number: from 1.
        run: fingerprint of what is made; records of another run are none of this one's.
        host: machine of the first rank.
        job: Slurm's id of the job; empty outside.
        restarts: how often Slurm or torchrun had started it again.
        processes: number of ranks.
        began_s: UNIX time at which the process began.
        alive_s: UNIX time of the last sign of life.
        seconds: where the time between went.
        spans: see train.throughput.Clock.
        skipped: steps of this attempt that changed nothing.
        committed: step of the newest checkpoint; 0 without one.
        exit: the exit code; None while it is under way, or where it was killed.
    """

    number: int
    run: str
    host: str
    job: str
    restarts: int
    processes: int
    began_s: float
    alive_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[list[tuple[int, float]]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    committed: int = 0
    exit: int | None = None

    @property
    def wall_s(self) -> float:
        return self.alive_s - self.began_s

    @property
    def trained_s(self) -> float:
        """Seconds of training steps, kept or not."""
        return sum(self.seconds.get(what, 0.0) for what in USEFUL)


def read(run_dir: Path) -> list[Attempt]:
    """The attempts of a run so far, in order."""
    found = []
    for file in (run_dir / DIRECTORY).glob("*.json"):
        try:
            found.append(Attempt(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):  # half gone, or of another version: the others still count
            warnings.warn(f"{file} cannot be read and is left out of the account", stacklevel=2)
    return sorted(found, key=lambda attempt: attempt.number)


@dataclass(frozen=True)
class Share:
    """What an attempt gave to the run.

    Args:
        attempt: its record.
        seconds: by USEFUL, OVERHEAD and LOST; `down` is the time before it began.
        first: step it began at; None where it did not come to train.
        last: steps done at its end.
        lost: steps of it that were trained again, or would have to be.
        skipped: steps among those kept that changed nothing.
    """

    attempt: Attempt
    seconds: dict[str, float]
    first: int | None
    last: int | None
    lost: int
    skipped: int


@dataclass(frozen=True)
class Account:
    """A run's wall time, over its attempts."""

    shares: list[Share]

    @property
    def seconds(self) -> dict[str, float]:
        """By USEFUL, OVERHEAD and LOST; together `wall_s`."""
        total: dict[str, float] = defaultdict(float)
        for share in self.shares:
            for what, seconds in share.seconds.items():
                total[what] += seconds
        return dict(total)

    @property
    def wall_s(self) -> float:
        """From the begin of the first attempt to the last sign of life of the last one."""
        return sum(share.attempt.wall_s + share.seconds["down"] for share in self.shares)

    @property
    def useful_s(self) -> float:
        return sum(self.seconds.get(what, 0.0) for what in USEFUL)

    @property
    def goodput(self) -> float:
        return self.useful_s / max(self.wall_s, 1e-9)

    @property
    def restarts_s(self) -> float:
        """What restarts cost: lost steps, the time between attempts, and the start of every attempt after the first."""
        again = [s.seconds.get(what, 0.0) for s in self.shares[1:] for what in ("init", "preflight")]
        return self.seconds.get("lost", 0.0) + self.seconds.get("down", 0.0) + sum(again)

    @property
    def lost_steps(self) -> int:
        return sum(share.lost for share in self.shares)

    def headline(self) -> str:
        """In one line: goodput, and where the rest went, most first."""
        rest = {what: s / max(self.wall_s, 1e-9) for what, s in self.seconds.items() if what not in USEFUL}
        shown = [f"{what} {share:.1%}" for what, share in sorted(rest.items(), key=lambda r: -r[1]) if share >= 5e-4]
        attempts = f"{len(self.shares)} attempt{'' if len(self.shares) == 1 else 's'}"
        return f"goodput {self.goodput:.1%} of {self.wall_s:,.1f} s over {attempts}; the rest: {'  '.join(shown)}"


def account(attempts: Sequence[Attempt]) -> Account:
    """What became of the time of each attempt, in the light of those after it."""
    shares = []
    limit: float = float("inf")  # the earliest step that anything later began at
    for i in range(len(attempts) - 1, -1, -1):
        attempt, ended = attempts[i], attempts[i].exit in (0, 75)
        if attempt.spans and not ended and limit == float("inf"):  # nothing went on from it so far
            limit = attempt.committed
            ended = attempt.spans[-1][-1][0] <= limit
        later, kept_s, kept, lost = limit, 0.0, 0, 0
        for span in reversed(attempt.spans):
            first, end = span[0][0], span[-1][0]
            until = max(first, min(end, limit))
            kept, lost = kept + int(until) - first, lost + end - int(until)
            kept_s += _at(span, until) - span[0][1]
            limit = min(limit, first)
        if attempt.spans and ended:  # what follows the last step belongs to it
            kept_s += attempt.trained_s - attempt.spans[-1][-1][1]
        skipped = sum(step <= later for step in attempt.skipped)
        skipped_s = kept_s * skipped / max(kept, 1)
        useful = (kept_s - skipped_s) / max(attempt.trained_s, 1e-9)
        seconds = {what: s * (useful if what in USEFUL else 1.0) for what, s in attempt.seconds.items()}
        seconds["lost"] = attempt.trained_s - kept_s
        seconds["skipped"] = skipped_s
        seconds["down"] = max(0.0, attempt.began_s - attempts[i - 1].alive_s) if i else 0.0
        first_step = attempt.spans[0][0][0] if attempt.spans else None
        end_step = attempt.spans[-1][-1][0] if attempt.spans else None
        shares.append(Share(attempt, seconds, first_step, end_step, lost, skipped))
    return Account(shares[::-1])


def _at(span: Sequence[tuple[int, float]], step: float) -> float:
    """Seconds of training until a step of a span; in between those that are remembered, evenly."""
    for (before, early), (after, late) in pairwise(span):
        if step <= after:
            return early + (late - early) * (step - before) / (after - before)
    return span[-1][1]


class Ledger(AbstractContextManager["Ledger"]):
    """Keeps the record of this attempt. On ranks that did not open one it only holds the clock."""

    def __init__(self) -> None:
        self.clock = Clock(torch.device("cpu"))
        self.progress: Progress | None = None
        """Once it is known: tells skipped steps."""
        self.newest: Callable[[], int | None] = lambda: None
        """Asked, from any thread, for the step of the newest checkpoint."""
        self._code: int | None = None
        self._earlier: list[Attempt] = []
        self._attempt: Attempt | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="goodput", daemon=True)

    def open(self, run_dir: Path, run: str, processes: int) -> None:
        """Begin the record. Those of another run that was given up here are removed.

        Args:
            run_dir: held by this process.
            run: fingerprint of what is made.
            processes: number of ranks.
        """
        self._directory = run_dir / DIRECTORY
        self._directory.mkdir(exist_ok=True)
        self._earlier = read(run_dir)
        if any(attempt.run != run for attempt in self._earlier):
            for file in self._directory.iterdir():
                file.unlink()
            self._earlier = []
        now = time.time()
        self._attempt = Attempt(
            number=1 + max((attempt.number for attempt in self._earlier), default=0),
            run=run,
            host=socket.gethostname(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
            processes=processes,
            began_s=now - self.clock.total_s,
            alive_s=now,
        )
        self._thread.start()

    def ends(self, code: int) -> int:
        """Take note of the exit code, which is returned."""
        self._code = code
        return code

    def account(self) -> Account:
        """Of the run so far, this attempt included."""
        return account([*self._earlier, *([self._now(self._attempt)] if self._attempt else [])])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._attempt is None:
            return
        self._attempt.exit = self._code if error is None else _code_of(error)
        self._closing.set()
        self._thread.join(CLOSING_S)

    def _keep(self) -> None:
        """In a thread of its own: a file system that is slow, or gone, holds up nothing."""
        told = False
        while True:
            last = self._closing.is_set()
            assert self._attempt is not None
            try:
                record = self._now(self._attempt)
                write_atomically(self._directory / f"{record.number:06d}.json", json.dumps(asdict(record)) + "\n")
            except OSError as error:
                if not told:
                    print(f"this attempt's time is not accounted for: {error}", file=sys.stderr, flush=True)
                told = True
            if last:
                return
            self._closing.wait(WRITTEN_S)

    def _now(self, attempt: Attempt) -> Attempt:
        """The record as it is at this moment."""
        spans = [list(span) for span in list(self.clock.spans)]  # before the seconds, which so cover them
        seconds = self.clock.spent()
        first = min((span[0][0] for span in spans), default=0)
        skipped = [step for step in list(self.progress.skipped) if step > first] if self.progress else []
        alive_s = attempt.began_s + sum(seconds.values())
        committed = self.newest() or 0
        return replace(attempt, alive_s=alive_s, seconds=seconds, spans=spans, skipped=skipped, committed=committed)


def _code_of(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, LongrunError):
        return error.exit_code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


_counted = False


def age_s() -> float:
    """Seconds since this process began, its interpreter's start and imports included; 0 from the second call on, when
    another run of the same process has counted them."""
    global _counted
    first, _counted = not _counted, True
    try:
        began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): starttime, in ticks
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(began) / os.sysconf("SC_CLK_TCK") if first else 0.0
    except (OSError, AttributeError):  # no Linux
        return 0.0
