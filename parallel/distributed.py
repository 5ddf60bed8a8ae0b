"""Processes: who this one is, and the group it belongs to.

A process learns its rank from torchrun (RANK, WORLD_SIZE, ...) or srun (SLURM_*), or is alone. Ranks on CUDA talk
through NCCL (and through gloo for tensors on the CPU), others through gloo.
"""

import hashlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from conf.errors import LongrunError, LostError
from parallel.watch import PATIENCE_S, Watch

T = TypeVar("T")

_started: "World | None" = None
_incarnation = 0
_watch: Watch | None = None


class DistributedError(LongrunError):
    """The launcher's variables name no place in a run."""


class RendezvousError(LostError):
    """The processes of a run could not find each other: a machine is missing, or another program has the port."""


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


@dataclass(frozen=True)
class Place:
    """What the launcher said, before anything is started.

    Args:
        rank, size, local_rank, local_size: as in World.
        address: host of the rendezvous: rank 0's.
        port: its port.
        launcher: who said it: "alone", "torchrun" or "srun".
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str = "alone"


def place() -> Place:
    """Read this process's place in the run from the environment.

    Raises:
        DistributedError: RANK is set but WORLD_SIZE, or the like, is not.
    """
    env = os.environ
    if "RANK" in env:
        try:
            return Place(
                rank=int(env["RANK"]),
                size=int(env["WORLD_SIZE"]),
                local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
                local_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
                address=env.get("MASTER_ADDR", "127.0.0.1"),
                port=int(env.get("MASTER_PORT", "29500")),
                launcher="torchrun",
            )
        except (KeyError, ValueError) as error:
            raise DistributedError(
                f"RANK={env['RANK']} is set, but {error} is missing or no number: start the run with torchrun or srun, "
                "or unset RANK to run alone."
            ) from error
    # Only srun sets the STEP variables: in the batch script itself, which is one process, they are absent.
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        size = int(env["SLURM_STEP_NUM_TASKS"])
        step = int(env.get("SLURM_JOB_ID", "0")) * 64 + int(env.get("SLURM_STEP_ID", "0"))
        return Place(
            rank=int(env["SLURM_PROCID"]),
            size=size,
            local_rank=int(env.get("SLURM_LOCALID", "0")),
            local_size=_tasks_on(env.get("SLURM_STEP_TASKS_PER_NODE", str(size)), int(env.get("SLURM_NODEID", "0"))),
            address=env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            port=int(env.get("MASTER_PORT") or 20000 + step % 10000),  # below the ports of outgoing connections
            launcher="srun",
        )
    return Place()


# `dp_shard: ${processes:}` in a configuration: as many as the launcher starts.
OmegaConf.register_new_resolver("processes", lambda: place().size, replace=True)


def _tasks_on(per_node: str, node: int) -> int:
    """Slurm writes tasks per node as "4(x2),3": 4 on the first two nodes, 3 on the next."""
    counts: list[int] = []
    for tasks, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(tasks)] * int(repeated or 1)
    return counts[node] if node < len(counts) else counts[-1]


def _first_host(nodes: str) -> str:
    """First of a Slurm node list such as "gpu[03-05,9],login1"."""
    if "[" not in nodes.split(",")[0]:
        return nodes.split(",")[0]
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]


def start(rendezvous_s: float = 300, collective_s: float = 600) -> World:
    """Join the run: choose the device, set the threads, make the process group. Calling it again changes nothing.

    Args:
        rendezvous_s: seconds to wait for the other processes.
        collective_s: seconds after which a collective that not all ranks reach ends the run.

    Raises:
        DistributedError: the environment names no place in a run.
        RendezvousError: the port is taken, or processes are missing; names them.
    """
    global _started, _incarnation
    if _started is not None:
        return _started
    here = place()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", here.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))
    _incarnation += 1
    store = dist.PrefixStore(_prefix(), _rendezvous(here, rendezvous_s))
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=here.rank,
        world_size=here.size,
        timeout=timedelta(seconds=collective_s),
        device_id=device if cuda else None,
    )
    _started = World(here.rank, here.size, here.local_rank, here.local_size, device)
    if here.rank == 0:
        processes = f"{here.size} processes ({here.local_size} on this machine)" if here.size > 1 else "1 process"
        threads = f"{torch.get_num_threads()} CPU threads each"
        print(f"{here.launcher}: {processes}, {device.type}, {'nccl' if cuda else 'gloo'}, {threads}", flush=True)
    return _started


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
        PeerFailedError: another rank failed; gives its reason.
    """
    global _watch
    world = start(**limits)
    if world.size > 1:
        _watch = _watcher(place(), patience_s)
    try:
        yield world
    except BaseException as error:
        if _watch is not None and (others := _watch.blame(error)):
            raise others from error
        raise
    finally:
        stop()


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


def _watcher(here: Place, patience_s: float) -> Watch:
    serves = here.rank == 0 and not _served_by_agent()
    server = "torchrun's agent" if _served_by_agent() else f"rank 0 of {here.size}"
    connection = dist.TCPStore(
        here.address, here.port, is_master=False, timeout=timedelta(seconds=patience_s), wait_for_workers=False
    )
    return Watch(
        dist.PrefixStore(f"{_prefix()}/watch", connection),
        here.rank,
        here.size,
        server=f"{server} (at {here.address})",
        serves=serves,
        patience_s=patience_s,
    )


_store: dist.Store | None = None


def _prefix() -> str:
    """Keys of an earlier group of this process, or of an earlier attempt under the same torchrun, must not be met."""
    return f"longrun/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_incarnation}"


def _rendezvous(here: Place, timeout_s: float) -> dist.Store:
    """A store that all ranks reach, once all have said that they are here."""
    global _store
    if here.size == 1:
        return dist.HashStore()
    if _store is None:  # kept while the process lives: a port cannot be bound again at once
        _store = _connect(here, timeout_s)
    name = f"{_prefix()}/here/{{}}"
    _store.set(name.format(here.rank), socket.gethostname())
    try:
        _store.wait([name.format(rank) for rank in range(here.size)], timedelta(seconds=timeout_s))
    except dist.DistError as error:
        missing = [rank for rank in range(here.size) if not _store.check([name.format(rank)])]
        raise RendezvousError(
            f"rank {', '.join(map(str, missing))} of {here.size} did not come within {timeout_s:g} s (rank {here.rank} "
            f"waits at {here.address}:{here.port}). Look at the output of that rank, and whether every machine was "
            "started with the same number of processes."
        ) from error
    return _store


def _served_by_agent() -> bool:
    """torchrun's agent holds the store already."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(here: Place, timeout_s: float) -> dist.TCPStore:
    where = f"{here.address}:{here.port}"
    try:
        return dist.TCPStore(
            here.address,
            here.port,
            is_master=here.rank == 0 and not _served_by_agent(),
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            message = f"port {where} is in use by another program: set MASTER_PORT to a free one."
            raise RendezvousError(message) from error
        raise RendezvousError(
            f"rank {here.rank} of {here.size} cannot reach rank 0 at {where} ({error}). Is rank 0 running, and does "
            "MASTER_ADDR name its machine?"
        ) from error
