"""What the launcher said, and what follows from it: this process's place in the run, its device and its network.

A process learns its place from torchrun (RANK, WORLD_SIZE, ...) or srun (SLURM_*), or is alone. srun names no port, so
it is derived from the job, and there are further ones in case another program has it.
"""

import fcntl
import os
import re
import socket
import struct
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf

from conf.errors import LongrunError, LostError

FIRST_PORT, PORTS = 20000, 10000
"""Ports that are derived from a job: below those of outgoing connections (32768 on Linux)."""
CANDIDATES, STRIDE = 8, 977
"""How many ports a job may try, and how far they are from each other: the next jobs have the next ports."""
SIOCGIFADDR = 0x8915  # netdevice(7)


class DistributedError(LongrunError):
    """The processes that were started are no run: started again like this, they would not be either."""


class RendezvousError(LostError):
    """The processes of a run could not find each other: a machine is missing, or another program has the port."""


@dataclass(frozen=True)
class Place:
    """What the launcher said, before anything is started.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on this machine.
        address: host of the rendezvous: rank 0's.
        port: its port.
        launcher: who said it: "alone", "torchrun" or "srun".
        job: what tells this run's processes from those of another that uses the same port; empty where nothing does.
        agent: whether torchrun's agent serves the rendezvous.
        derived: whether the port is derived from the job, so that others may do as well.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str = "alone"
    job: str = ""
    agent: bool = False
    derived: bool = False

    @property
    def ports(self) -> list[int]:
        """Where the rendezvous may be, in the order in which they are tried."""
        if not self.derived:
            return [self.port]
        return [FIRST_PORT + (self.port - FIRST_PORT + number * STRIDE) % PORTS for number in range(CANDIDATES)]


def place() -> Place:
    """Read this process's place in the run from the environment.

    Raises:
        DistributedError: RANK is set but WORLD_SIZE, or the like, is not; or a rank is not among those of the run.
    """
    if "RANK" in os.environ:
        here = _of_torchrun(os.environ["RANK"])
    # Only srun sets the STEP variables: in the batch script itself, which is one process, they are absent.
    elif "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ:
        here = _of_srun()
    else:
        return Place()
    if not 0 <= here.rank < here.size:
        raise DistributedError(
            f"rank {here.rank} is not one of {here.size}: ranks go from 0 to {here.size - 1}. Start the run with "
            "torchrun or srun, which count them, or unset RANK to run alone."
        )
    return here


def _of_torchrun(rank: str) -> Place:
    env = os.environ
    try:
        return Place(
            rank=int(rank),
            size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", rank)),
            local_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
            address=env.get("MASTER_ADDR", "127.0.0.1"),
            port=int(env.get("MASTER_PORT", "29500")),
            launcher="torchrun",
            job=env.get("TORCHELASTIC_RUN_ID", ""),
            agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    except (KeyError, ValueError) as error:
        raise DistributedError(
            f"RANK={rank} is set, but {error} is missing or no number: start the run with torchrun or srun, "
            "or unset RANK to run alone."
        ) from error


def _of_srun() -> Place:
    env = os.environ
    size = int(env["SLURM_STEP_NUM_TASKS"])
    job, step = env.get("SLURM_JOB_ID", "0"), env.get("SLURM_STEP_ID", "0")
    port = env.get("MASTER_PORT")
    return Place(
        rank=int(env["SLURM_PROCID"]),
        size=size,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        local_size=_tasks_on(env.get("SLURM_STEP_TASKS_PER_NODE", str(size)), int(env.get("SLURM_NODEID", "0"))),
        address=env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        port=int(port) if port else FIRST_PORT + (int(job) * 64 + int(step)) % PORTS,
        launcher="srun",
        job=f"step {job}.{step}, start {env.get('SLURM_RESTART_COUNT', '0')}",
        derived=not port,
    )


# `dp_shard: ${processes:}` in a configuration: as many as the launcher starts.
OmegaConf.register_new_resolver("processes", lambda: place().size, replace=True)


def micro_batches_of(samples: int, *, _root_: DictConfig) -> int:
    """The fewest micro-batches of at most so many samples that make up a process's share of the global batch; where no
    share is even, the layout tells."""
    share = _root_.stage.global_batch // place().size or 1
    return next(count for count in range(1, share + 1) if share % count == 0 and share // count <= max(1, samples))


OmegaConf.register_new_resolver("micro_batches_of", micro_batches_of, replace=True)


def _tasks_on(per_node: str, node: int) -> int:
    """Slurm writes tasks per node as "4(x2),3": 4 on the first two nodes, 3 on the next."""
    counts: list[int] = []
    for tasks, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(tasks)] * int(repeated or 1)
    return counts[node] if node < len(counts) else counts[-1]


def _first_host(nodes: str) -> str:
    """First of a Slurm node list such as "gpu[03-05,9],login1": gpu03. In a container there is no scontrol to ask."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "it matches an empty text too"
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def device_of(here: Place) -> torch.device:
    """Where this process computes: a GPU of its own, where there are any.

    Raises:
        DistributedError: there are fewer GPUs than processes on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if here.local_rank < visible:
        return torch.device("cuda", here.local_rank)
    if here.launcher == "srun":  # --gpus-per-task shows each task its own; that two share none is seen when all meet
        return torch.device("cuda", 0)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    raise DistributedError(
        f"{here.local_size} processes on {socket.gethostname()}, but {visible} GPU{'s' * (visible != 1)} "
        + (f"(CUDA_VISIBLE_DEVICES={shown})" if shown else "there")
        + f": start {visible} there (torchrun --nproc-per-node={visible}), or run without GPUs (CUDA_VISIBLE_DEVICES=)."
    )


def name_of(device: torch.device) -> str:
    """What tells this GPU from all others; empty on the CPU. Slices of one GPU (MIG) are told apart by how they are
    asked for."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    slices = os.environ.get("CUDA_VISIBLE_DEVICES", "") if "MIG" in properties.name else ""
    return f"{properties.uuid} {slices}".strip()


def share_cores(here: Place) -> None:
    """CPU threads: those that OMP_NUM_THREADS asks for, else this process's share of the cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))


def route_to(address: str) -> str:
    """This machine's own address on the way to another, which nothing is sent to; empty where there is no way."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def interface_of(own: str) -> str:
    """The network interface that has an address of this machine; empty where none is found (IPv6, other systems)."""
    if is_loopback(own):
        own = "127.0.0.1"  # 127.0.1.1 is the loopback's too, though it does not say so
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return ""


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def use_interface(name: str) -> list[str]:
    """Let gloo and NCCL talk through an interface, where the environment does not choose one.

    Returns:
        Those whose interface is derived.
    """
    derived = []
    # NCCL takes what it is given as the beginning of names; with "=" it is the whole one.
    for library, value in (("gloo", name), ("nccl", f"={name}")):
        variable = f"{library.upper()}_SOCKET_IFNAME"
        if name and variable not in os.environ:
            os.environ[variable] = value
            derived.append(library)
    return derived
