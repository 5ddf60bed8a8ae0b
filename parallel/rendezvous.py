"""How the processes of a run find each other: a store that all reach, and a seat in it for each rank.

Rank 0 serves the store, or torchrun's agent does. A meeting has a number, which rank 0 draws when it comes; everybody
takes the seat of its rank in it, which only one process can; when all seats are taken, rank 0 looks at who has them and
lets all go, or tells all what is wrong.

    <space>/meeting              number of the newest one
    <space>/<number>/seat/<rank> who took it (a Seat)
    <space>/<number>/taken       how many are
    <space>/<number>/full        set by whoever took the last one
    <space>/<number>/refused     how many found their seat taken; with /1, /2, ...: who
    <space>/<number>/go          what rank 0 found (a Word)

An agent's store outlives the processes, so that the keys of earlier ones are there still, and each agent counts its own
restarts. A process that finds its seat taken there waits for the next meeting. In a store of rank 0's it is one too
many.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.launch import DistributedError, Place, RendezvousError, is_loopback
from parallel.verdict import spans

REMIND_S = 30.0
"""Between two lines about who is waited for."""
LOOK_S = 2.0
"""How long a process waits before it looks whether there is a newer meeting."""
RETRY_S = 0.2
"""Between two tries to reach rank 0."""
PROBE_S = 3.0
"""Most that a program on rank 0's port has to answer as a store does; others never do."""
FAREWELL_S = 1.0
"""How long rank 0's store stays, so that all can read why nobody goes."""
RUN = "longrun/run"
"""Whose store it is."""
AGAIN = "Was the same command started a second time? Another run on these machines needs another MASTER_PORT."


@dataclass(frozen=True)
class Seat:
    """The process that is a rank.

    Args:
        rank: which.
        size: ranks that it counts.
        host: its machine.
        pid: its number there.
        token: its own, whatever the numbers.
        device: kind of its device.
        gpu: name of its GPU; empty on the CPU.
        address: its own address on the way to the store.
        problem: what keeps it from computing.
        job: the run that it belongs to; see Place.
    """

    rank: int
    size: int
    host: str
    pid: int
    token: str
    device: str = "cpu"
    gpu: str = ""
    address: str = ""
    problem: str = ""
    job: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Word:
    """What rank 0 tells all.

    Args:
        problem: why nobody goes.
        missing: whether it is that ranks are missing.
        machines: how many there are.
        abroad: address of a process on another machine than rank 0's; empty where there is none.
    """

    problem: str = ""
    missing: bool = False
    machines: int = 1
    abroad: str = ""


@dataclass(frozen=True)
class Meeting:
    """All are here.

    Args:
        store: where they can leave things for each other.
        space: what their keys begin with.
        word: what rank 0 said.
    """

    store: dist.Store
    space: str
    word: Word


_TOKEN_OF: dict[int, str] = {}
_store: dist.TCPStore | None = None
_last = 0
"""Number of the last meeting that this process was at."""


def sit(here: Place, **facts: str) -> Seat:
    """This process as a rank of the run."""
    token = _TOKEN_OF.setdefault(os.getpid(), uuid.uuid4().hex)  # a fork is another process
    return Seat(here.rank, here.size, socket.gethostname(), os.getpid(), token, job=here.job, **facts)


def meet(here: Place, seat: Seat, timeout_s: float) -> Meeting:
    """Wait until every rank has come.

    Args:
        here: what the launcher said.
        seat: this process.
        timeout_s: how long to wait.

    Raises:
        DistributedError: ranks are here twice, or what they say does not go together; names them.
        RendezvousError: ranks are missing, or another program has the port; names them.
    """
    global _store, _last
    deadline = time.monotonic() + timeout_s
    if here.size == 1:
        if seat.problem:
            raise DistributedError(seat.problem)
        return Meeting(dist.HashStore(), "longrun", Word())
    if _store is None:  # kept while the process lives: a port cannot be bound again at once
        _store = _serve(here, seat) if here.rank == 0 and not here.agent else _reach(here, seat, deadline, timeout_s)
    space = f"longrun/{here.size}"  # agents that came one after the other do not count the same restarts
    waiting = _Waiting(_store, space, here, seat, deadline, timeout_s)
    number, word = waiting.as_first() if here.rank == 0 else waiting.as_other(_last)
    _last = number
    if word.problem:
        if here.rank == 0:
            time.sleep(FAREWELL_S)
        raise (RendezvousError if word.missing else DistributedError)(word.problem)
    return Meeting(_store, f"{space}/{number}", word)


def connection(here: Place, timeout_s: float) -> dist.TCPStore:
    """A further connection to the store of this run."""
    assert _store is not None
    return dist.TCPStore(
        here.address, _store.port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def served_at(here: Place) -> str:
    """Where the store is, in words."""
    port = _store.port if _store is not None else here.port
    if here.agent:
        return f"{here.address}:{port} (torchrun's agent)"
    why = " (of the job's number)" if here.derived else ""
    return f"{here.address}:{port}{why}"


class _Waiting:
    """One process's way into a meeting."""

    def __init__(self, store: dist.Store, space: str, here: Place, seat: Seat, deadline: float, timeout_s: float):
        self.store, self.space, self.here, self.seat = store, space, here, seat
        self.deadline, self.timeout_s = deadline, timeout_s
        self.reminders = _Reminders(timeout_s)

    def as_first(self) -> tuple[int, Word]:
        """Rank 0: call the meeting, wait for all, and tell them."""
        number = self.store.add(f"{self.space}/meeting", 1)
        self._take(number)
        while not self._told(f"{self.space}/{number}/full"):
            self.reminders.say(lambda: f"waiting for {self._missing(number)}")
            if time.monotonic() > self.deadline:
                text = f"{self._missing(number)} did not come within {self._limit}"
                return number, self._tell(number, Word(text, missing=True))
        keys = [f"{self.space}/{number}/seat/{rank}" for rank in range(self.here.size)]
        return number, self._tell(number, judge([Seat(**json.loads(said)) for said in self.store.multi_get(keys)]))

    def as_other(self, last: int) -> tuple[int, Word]:
        """Take the seat in the newest meeting, and wait for rank 0's word.

        Args:
            last: number of the last meeting that this process was at.
        """
        number, owner = last, None
        while True:
            newest = self.store.add(f"{self.space}/meeting", 0)
            if newest > number:
                number = newest
                owner = self._take(number)
                if owner != self.seat and not self.here.agent:
                    raise DistributedError(self._refused(number, owner))
            if owner == self.seat and self._told(f"{self.space}/{number}/go"):
                return number, Word(**json.loads(self.store.get(f"{self.space}/{number}/go")))
            if owner != self.seat:
                self._told(f"{self.space}/{number + 1}/seat/0")
                if self.here.local_rank == 0:
                    self.reminders.say(lambda: f"rank {self.here.rank} waits for rank 0 of {self.here.size}")
            if time.monotonic() > self.deadline + LOOK_S:  # rank 0 knows who is missing, if it is there
                who = "rank 0" if owner != self.seat else "some rank"
                raise RendezvousError(f"{who} of {self.here.size} did not come within {self._limit}")

    def _told(self, key: str) -> bool:
        """Wait a little for a key."""
        wait_s = min(LOOK_S, max(0.05, self.deadline - time.monotonic()))
        try:
            self.store.wait([key], timedelta(seconds=wait_s))
        except dist.DistStoreError:
            return False
        return True

    def _take(self, number: int) -> Seat:
        """Whoever has this rank's seat now."""
        key = f"{self.space}/{number}"
        owner = Seat(**json.loads(self.store.compare_set(f"{key}/seat/{self.here.rank}", "", _json(self.seat))))
        if owner == self.seat and self.store.add(f"{key}/taken", 1) == self.here.size:
            self.store.set(f"{key}/full", "")
        return owner

    def _refused(self, number: int, owner: Seat) -> str:
        """Told to rank 0 as well: where a rank came twice, another often is missing."""
        text = f"rank {self.seat.rank} was started twice: {owner} is that rank, {self.seat} is one too many"
        key = f"{self.space}/{number}/refused"
        self.store.set(f"{key}/{self.store.add(key, 1)}", text)
        return f"{text}. {AGAIN}"

    def _missing(self, number: int) -> str:
        key = f"{self.space}/{number}"
        missing = [rank for rank in range(self.here.size) if not self.store.check([f"{key}/seat/{rank}"])]
        found = f"rank {spans(missing)} of {self.here.size}"
        refused = [f"{key}/refused/{one + 1}" for one in range(self.store.add(f"{key}/refused", 0))]
        return found + "".join(f" ({self.store.get(one).decode()})" for one in refused)

    def _tell(self, number: int, word: Word) -> Word:
        self.store.set(f"{self.space}/{number}/go", _json(word))
        return word

    @property
    def _limit(self) -> str:
        return (
            f"{self.timeout_s:g} s (the others wait at {served_at(self.here)}). Look at the output of that rank, and "
            "whether every machine was started with the same number of processes."
        )


class _Reminders:
    """Lines that come every REMIND_S."""

    def __init__(self, timeout_s: float):
        self.began = self.last = time.monotonic()
        self.timeout_s = timeout_s

    def say(self, text: Callable[[], str]) -> None:
        now = time.monotonic()
        if now - self.last >= REMIND_S:
            self.last = now
            print(f"{text()}: {now - self.began:.0f} of at most {self.timeout_s:g} s", flush=True)


def judge(seats: Sequence[Seat]) -> Word:
    """Whether those who came can be one run."""
    problems = [f"rank {seat.rank} ({seat}): {seat.problem}" for seat in seats if seat.problem]
    kinds = Counter(seat.device for seat in seats if not seat.problem)
    if len(kinds) > 1:
        odd = min(kinds, key=lambda kind: kinds[kind])
        having = [seat for seat in seats if seat.device == odd]
        hosts = ", ".join(sorted({seat.host for seat in having}))
        problems.append(
            f"rank {spans(seat.rank for seat in having)} (on {hosts}) would compute on {odd}, the others on "
            f"{max(kinds, key=lambda kind: kinds[kind])}: look at the driver and at CUDA_VISIBLE_DEVICES there."
        )
    users: dict[tuple[str, str], list[int]] = defaultdict(list)
    for seat in seats:
        if seat.gpu:
            users[seat.host, seat.gpu].append(seat.rank)
    problems += [
        f"rank {spans(ranks)} (on {host}) would share the GPU {gpu}: start as many processes there as it has GPUs, or "
        "give each its own (srun --gpus-per-task=1)."
        for (host, gpu), ranks in users.items()
        if len(ranks) > 1
    ]
    abroad = [seat.address for seat in seats if seat.host != seats[0].host and not is_loopback(seat.address)]
    machines = len({seat.host for seat in seats})
    return Word(_listed(problems) if problems else "", False, machines, next(iter(abroad), ""))


def _listed(problems: Sequence[str]) -> str:
    return "the processes of this run cannot work together:\n  " + "\n  ".join(problems)


def _json(value: Seat | Word) -> str:
    return json.dumps(asdict(value))


def _listening(address: str, port: int) -> dist.TCPStore:
    """A store that nobody elsewhere reaches where all ranks are on this machine; torch's own socket listens to all."""
    if not is_loopback(address):
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen()
        descriptor = listening.detach()
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def _serve(here: Place, seat: Seat) -> dist.TCPStore:
    """Rank 0's store, on the first port that is free."""
    for port in here.ports:
        try:
            store = _listening(here.address, port)
        except (dist.DistError, OSError) as error:
            if "EADDRINUSE" not in str(error) and "address already in use" not in str(error).lower():
                raise DistributedError(
                    f"rank 0 cannot serve the rendezvous at {here.address}:{port}: {error}"
                ) from error
            _check_other(here, seat, port)
            continue
        store.set(RUN, _json(seat))
        return store
    ports = ", ".join(map(str, here.ports))
    raise RendezvousError(
        f"port {here.address}:{ports} is in use by another program: set MASTER_PORT to a free one"
        + (", the same for all processes." if here.size > here.local_size else ".")
    )


def _check_other(here: Place, seat: Seat, port: int) -> None:
    """What has rank 0's port may be a run's rank 0.

    Raises:
        DistributedError: it is this run's, or, where no other port can be taken, another's.
    """
    until = time.monotonic() + PROBE_S
    store, owner = _store_at(here.address, port)
    while store is not None and owner is None and time.monotonic() < until:  # it says whose it is in a moment
        time.sleep(RETRY_S)
        store, owner = _store_at(here.address, port)
    if owner is not None and (owner.job == seat.job or not here.derived):
        raise DistributedError(
            f"port {here.address}:{port} is in use by {owner}, which is rank 0 of {owner.size} already; {seat} is one "
            f"too many. {AGAIN}"
        )


def _reach(here: Place, seat: Seat, deadline: float, timeout_s: float) -> dist.TCPStore:
    """A connection to the store of this run, once it is there."""
    reminders = _Reminders(timeout_s)
    while True:
        found = ""
        for port in here.ports:
            store, owner = _store_at(here.address, port)
            if store is not None and (here.agent or (owner is not None and owner.job == seat.job)):
                _check_size(seat, owner)
                store.set_timeout(timedelta(seconds=timeout_s))
                return store
            if store is not None and owner is not None:
                found += f"; at port {port} is another run's rank 0, {owner}"
        where = f"{here.address}:{', '.join(map(str, here.ports))}"
        if here.local_rank == 0:
            reminders.say(lambda: f"rank {here.rank} of {here.size} waits for rank 0 at {where}")  # noqa: B023
        if time.monotonic() > deadline:
            raise RendezvousError(
                f"rank {here.rank} of {here.size} cannot reach rank 0 at {where} within {timeout_s:g} s{found}. Is "
                "rank 0 running, does MASTER_ADDR name its machine, and do all processes have the same MASTER_PORT?"
            )
        time.sleep(RETRY_S)


def _check_size(seat: Seat, first: Seat | None) -> None:
    if first is not None and first.size != seat.size:
        raise DistributedError(
            f"rank {seat.rank} ({seat}) was started as one of {seat.size} processes, rank 0 ({first}) as one of "
            f"{first.size}: start all with the same number (WORLD_SIZE; torchrun --nnodes, --nproc-per-node; srun -n)."
        )


def _store_at(address: str, port: int) -> tuple[dist.TCPStore | None, Seat | None]:
    """The store behind a port, and whose it is: None where it is no run's, or not yet."""
    try:
        socket.create_connection((address, port), PROBE_S).close()
    except OSError:
        return None, None
    found: list[tuple[dist.TCPStore, Seat | None]] = []

    def ask() -> None:
        limit = timedelta(seconds=PROBE_S)
        with suppress(dist.DistError):
            store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
            found.append((store, Seat(**json.loads(store.get(RUN))) if store.check([RUN]) else None))

    # A program that takes connections and says nothing would hold TCPStore for ever, whatever its timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_S)
    return found[0] if found else (None, None)
