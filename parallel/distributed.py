"""Processes: who this one is, and the group it belongs to.

`parallel.launch` reads what the launcher said, `parallel.rendezvous` brings the processes together. Ranks on CUDA talk
through NCCL (and through gloo for tensors on the CPU), others through gloo.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel import launch, rendezvous
from parallel.launch import DistributedError, Place, RendezvousError, place
from parallel.standing import RECORDED
from parallel.watch import GRACE_S, PATIENCE_S, Watch

__all__ = [
    "DistributedError",
    "Place",
    "RendezvousError",
    "World",
    "differences",
    "joined",
    "keep_stacks",
    "on_device",
    "place",
    "reached",
    "start",
    "stop",
    "thrown_out",
]

T = TypeVar("T")
SETTINGS = {"cpu": ("GLOO_", "TORCH_GLOO_"), "cuda": ("GLOO_", "TORCH_GLOO_", "NCCL_", "TORCH_NCCL_")}
"""What the variables begin with that steer how processes on such a device talk."""

COLLECTIVE_S = 600.0
SPARE_S = 60.0
"""What a collective on a GPU has beyond the time after which those that wait there look for who is to blame."""

_started: "World | None" = None
_meeting: rendezvous.Meeting | None = None
_watch: Watch | None = None


@dataclass(frozen=True)
class World:
    """This process among the processes of the run.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on this machine.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def start(rendezvous_s: float = 300, collective_s: float = COLLECTIVE_S) -> World:
    """Join the run: choose the device, set the threads, make the process group. Calling it again changes nothing.

    Args:
        rendezvous_s: seconds to wait for the other processes.
        collective_s: seconds after which a collective that not all ranks reach ends the run.

    Raises:
        DistributedError: the environment names no place in a run, a rank is here twice, or has no device of its own.
        RendezvousError: the port is taken, or processes are missing; names them.
    """
    global _started, _meeting
    if _started is not None:
        return _started
    here = place()
    device, problem = torch.device("cpu"), ""
    try:
        device = launch.device_of(here)
    except DistributedError as error:  # told when all have met: the others would wait for this one
        problem = str(error)
    own = launch.route_to(here.address)
    seat = rendezvous.sit(here, device=device.type, gpu=launch.name_of(device), address=own, problem=problem)
    _meeting = rendezvous.meet(here, seat, rendezvous_s)
    chosen = [name for name in sorted(os.environ) if name.startswith(SETTINGS[device.type])]
    # On rank 0's machine the way to rank 0 may be the loopback, on which no other machine finds it.
    abroad = _meeting.word.abroad
    launch.use_interface(launch.interface_of(launch.route_to(abroad) if abroad and launch.is_loopback(own) else own))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    launch.share_cores(here)
    # NCCL ends the process, with no word of who is to blame: that is left for when nobody was found.
    limit = timedelta(seconds=collective_s + (SPARE_S if device.type == "cuda" else 0))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED))
    # For groups that are made later (axes of a mesh, monitor, checkpoints); torch's own is half an hour.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = limit
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(_meeting.space, _meeting.store),
        rank=here.rank,
        world_size=here.size,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    _started = World(here.rank, here.size, here.local_rank, here.local_size, device)
    if here.rank == 0:
        print(_shown(here, device, rendezvous_s, collective_s, chosen), flush=True)
    return _started


def _shown(here: Place, device: torch.device, rendezvous_s: float, collective_s: float, chosen: list[str]) -> str:
    """What was derived, in a few lines.

    Args:
        chosen: variables that the environment brought.
    """
    assert _meeting is not None
    cuda = device.type == "cuda"
    machines = _meeting.word.machines
    processes = "1 process" if here.size == 1 else f"{here.size} processes on {machines} machine{'s' * (machines > 1)}"
    kind = f"cuda ({torch.cuda.get_device_name(device)})" if cuda else "cpu"
    lines = [f"{here.launcher}: {processes}, {kind}, {torch.get_num_threads()} CPU threads each"]
    if here.size > 1:
        talk = [f"{name} over {_interface(name)}" for name in (("nccl", "gloo") if cuda else ("gloo",))]
        lines += [
            f"  rendezvous at {rendezvous.served_at(here)}, {', '.join(talk)}",
            f"  waits at most {rendezvous_s:g} s for a rank, {collective_s:g} s for a collective",
        ]
    if chosen:
        lines.append("  set from outside: " + " ".join(f"{name}={os.environ[name]}" for name in chosen))
    return "\n".join(lines)


def _interface(library: str) -> str:
    return os.environ.get(f"{library.upper()}_SOCKET_IFNAME", "an interface of its own choice").removeprefix("=")


def stop() -> None:
    """Leave the process group, if there is one."""
    global _started, _watch
    if _watch is not None:
        _watch.close()
        _watch = None
    if _started is not None:
        dist.destroy_process_group()
        _started = None


@contextmanager
def joined(patience_s: float = PATIENCE_S, **limits: float) -> Iterator[World]:
    """Be one of the run's ranks for the length of the block, where all watch each other (see `parallel.watch`).

    Args:
        patience_s: seconds without a sign of life after which a rank is gone.
        limits: of `start()`.

    Raises:
        DistributedError, RendezvousError: see `start()`.
        PeerError: another rank died or hangs; names it.
        BrokenError: a collective broke, though all ranks came to it and live.
        PeerFailedError: another rank failed; gives its reason.
    """
    global _watch
    world = start(**limits)
    if world.size > 1:
        _watch = _watcher(world.device, patience_s, limits.get("collective_s", COLLECTIVE_S))
    try:
        yield world
    except BaseException as error:
        if _watch is not None and (others := _watch.blame(error)):
            raise others from error
        raise
    finally:
        stop()


@contextmanager
def thrown_out() -> Iterator[None]:
    """Around collectives after which a rank has much to close: should one break, the others know of it at once."""
    try:
        yield
    except BaseException as error:
        if _watch is not None:
            _watch.note(error)
        raise


@contextmanager
def on_device() -> Iterator[None]:
    """Around a wait for the device, which may be for another rank."""
    if _watch is None:
        yield
        return
    _watch.waits_since = time.monotonic()
    try:
        yield
    finally:
        _watch.waits_since = None


def keep_stacks(directory: Path | None) -> None:
    """Where each rank writes its stacks should the run be lost. Every rank calls it; what rank 0 says counts."""
    told = [directory]
    if _watch is not None:
        dist.broadcast_object_list(told)
        if told[0] is not None:
            _watch.keep_stacks(told[0])


def reached(step: int) -> None:
    """Tell the other ranks, should they have to name this one, which step it has finished."""
    if _watch is not None:
        _watch.step = step


def differences(facts: Mapping[str, object]) -> dict[str, dict[str, list[int]]]:
    """Where the ranks do not say the same: key -> value -> the ranks that have it. Every rank gets the same answer.
    Where all agree it costs one small exchange.

    Args:
        facts: of this rank; compared by their `repr`.
    """
    shown = {key: repr(value) for key, value in facts.items()}
    digest = hashlib.sha256(repr(sorted(shown.items())).encode()).hexdigest()
    if len(set(_everyones(digest))) == 1:
        return {}
    everyones = _everyones(shown)
    found: dict[str, dict[str, list[int]]] = {}
    for key in sorted(set().union(*everyones)):
        having: dict[str, list[int]] = {}
        for rank, said in enumerate(everyones):
            having.setdefault(said.get(key, "absent"), []).append(rank)
        if len(having) > 1:
            found[key] = having
    return found


def _everyones(mine: T) -> list[T]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def _watcher(device: torch.device, patience_s: float, collective_s: float) -> Watch:
    assert _meeting is not None
    here = place()
    server = "torchrun's agent" if here.agent else f"rank 0 of {here.size}"
    return Watch(
        dist.PrefixStore(f"{_meeting.space}/watch", rendezvous.connection(here, patience_s)),
        here.rank,
        here.size,
        server=f"{server} (at {here.address})",
        serves=here.rank == 0 and not here.agent,
        patience_s=patience_s,
        collective_s=collective_s,
        leaving_s=collective_s if device.type == "cpu" else GRACE_S,  # a kernel that waits would never leave
    )
