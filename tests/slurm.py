"""A real Slurm of several nodes on this machine, for tests: Debian's packages, no systemd, no cgroups, nothing outside
its directory.

Each node is a slurmd in namespaces of its own (processes, host name, mounts): it has a name that the others resolve,
and killing the namespace's first process takes slurmd and all that runs on the node with it, as a power cut would.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
SECONDS = 30
"""Most that the cluster may take to come up, and a node to be seen."""

CPUS, MEMORY_MB, GPUS = 2, 4000, 2
"""Of each node; no GPU of them is real."""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL"}

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
TreeWidth=65533
KillWait=5
OverTimeLimit=0
MinJobAge=3600
InactiveLimit=0
PropagateResourceLimits=NONE
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}"
)
PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=10 PriorityTier=10 PreemptMode=OFF
"""


class SlurmError(AssertionError):
    """The cluster, or a job, did not do what was waited for."""


@dataclass
class Cluster:
    """Slurm's daemons. `SLURM_CONF` leads every command of this process, and of its children, to them.

    Args:
        root: an empty directory for their state and logs; its path is short, as it holds a socket.
        size: nodes; they are called n1, n2...
    """

    root: Path
    size: int = 3
    servers: list[subprocess.Popen] = field(default_factory=list)
    nodes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.size + 1)]

    def start(self) -> None:
        """Bring up the controller and every node."""
        self._configure()
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{option}={self.root / name}" for option, name in files.items()]
        self.servers.append(_started(["munged", "--foreground", "--force", *options]))
        until(lambda: (self.root / "munge.socket").exists(), f"munged did not come up; see {self.root}/munge.log")
        self.servers.append(_started(["slurmctld", "-D", "-f", str(self.root / "slurm.conf")]))
        for name in self.names:
            self._boot(name)
        until(lambda: set(self.states().values()) == {"idle"}, f"Slurm did not come up; see {self.root}/*.log")

    def stop(self) -> None:
        """End it all, each process by its number."""
        for name in list(self.nodes):
            self.kill(name)
        for server in reversed(self.servers):
            server.terminate()
            try:
                server.wait(SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def _configure(self) -> None:
        for directory in ("state", *(f"spool/{name}" for name in self.names)):
            (self.root / directory).mkdir(parents=True)
        addresses = {name: f"127.0.1.{number}" for number, name in enumerate(self.names, start=1)}
        port, *ports = _free_ports(1 + self.size)
        nodes = [
            NODE.format(name=name, address=addresses[name], port=own, cpus=CPUS, memory=MEMORY_MB, gpus=GPUS)
            for name, own in zip(self.names, ports, strict=True)
        ]
        host = os.uname().nodename.split(".")[0]
        head = CONFIGURATION.format(root=self.root, host=host, port=port)
        (self.root / "slurm.conf").write_text("\n".join([head, *nodes, PARTITIONS]))
        for number in range(GPUS):
            (self.root / f"gpu{number}").touch()
        devices = f"Name=gpu File={self.root}/gpu[0-{GPUS - 1}]"
        (self.root / "gres.conf").write_text(f"NodeName={','.join(self.names)} {devices}\n")
        lines = [f"{address} {name}" for name, address in addresses.items()]
        (self.root / "hosts").write_text("\n".join([Path("/etc/hosts").read_text(), *lines]) + "\n")
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o600)

    def _boot(self, name: str) -> None:
        inside = (
            f"hostname {name} && mount --bind {self.root}/hosts /etc/hosts && "
            f"slurmd -D -N {name} -f {self.root}/slurm.conf"
        )
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        self.nodes[name] = _started([*apart, "sh", "-c", f"{inside} & wait"])

    # Nodes.

    def kill(self, name: str) -> None:
        """Cut the node's power."""
        node = self.nodes.pop(name)
        node.kill()
        node.wait()

    def up(self, name: str) -> None:
        """Bring a node that was killed back, and wait until Slurm gives it work again."""
        self._boot(name)
        until(
            lambda: self.states()[name] in ("idle", "mixed", "allocated"),
            f"{name} did not come back; see {self.root}/slurmd-{name}.log",
        )

    def states(self) -> dict[str, str]:
        """Node -> idle, mixed, allocated, down... A trailing * says that it does not answer."""
        shown = _asked("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        return dict(line.split() for line in shown.splitlines())

    # Jobs.

    def submit(self, script: str, *options: str) -> str:
        """sbatch a shell script; returns the job's number."""
        text = f"#!/bin/bash\n{script}\n"
        given = ["sbatch", "--parsable", "--output=/dev/null", *options]
        return subprocess.run(given, input=text, text=True, check=True, capture_output=True).stdout.strip()

    def job(self, number: str | int) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Reason, Restarts, ExitCode, NodeList, BatchHost..."""
        shown = _asked("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def jobs(self) -> list[str]:
        """The numbers of all that are pending or running."""
        return _asked("squeue", "--noheader", "--format=%i").split()

    def wait(self, number: str | int, *states: str, timeout_s: float = 60, restarts: int = 0) -> dict[str, str]:
        """Wait until a job is in one of these states, after at least so many restarts; without states, until it has
        ended. Returns its fields."""
        wanted = set(states) or ENDED
        seen: dict[str, str] = {}

        def there() -> bool:
            seen.clear()
            seen.update(self.job(number))
            here = int(seen.get("Restarts", "0")) >= restarts
            if here and seen.get("JobState") in ENDED - wanted:
                shown = {key: seen.get(key) for key in ("JobState", "Reason", "ExitCode", "Restarts", "StdOut")}
                raise SlurmError(f"job {number} is not {' or '.join(sorted(wanted))} but {shown}")
            return here and seen.get("JobState") in wanted

        until(there, f"job {number} did not become {' or '.join(sorted(wanted))}: it is {{}}", timeout_s, seen)
        return seen

    def clear(self) -> None:
        """Cancel every job, bring every node back, wait until all is idle."""
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        for name in set(self.names) - set(self.nodes):
            self._boot(name)
        until(
            lambda: not self.jobs() and set(self.states().values()) == {"idle"},
            f"the cluster did not come to rest; see {self.root}/*.log",
        )


def running(root: Path, size: int = 3) -> Iterator[Cluster]:
    """A Slurm that is up. Debian's packages are installed where they are missing and this is root.

    Args:
        root: an empty directory; see `Cluster`.
        size: nodes.
    """
    if os.geteuid() != 0:
        _go_without("only root can start a Slurm")
    if _lacking() and shutil.which("apt-get"):
        quiet = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", *command], env=quiet, stdout=subprocess.DEVNULL, check=False)
    if lacking := _lacking():
        _go_without(f"{', '.join(lacking)} missing (Debian: {' '.join(PACKAGES)})")
    cluster = Cluster(root, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(root / "slurm.conf"))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _lacking() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def _go_without(why: str) -> None:
    """Loudly; where all tests must run, it is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"no Slurm here: {why}")
    print(f"the tests of Slurm are skipped: {why}", file=sys.__stderr__)
    pytest.skip(f"no Slurm here: {why}")


def _started(command: list[str]) -> subprocess.Popen:
    """It dies with this process, however that ends."""
    dying = ["setpriv", "--pdeathsig", "KILL", *command]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(dying, **quiet)


def _asked(*command: str) -> str:
    """What a command prints; nothing while the controller is away."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def until(condition: Callable[[], bool], what: str, timeout_s: float = SECONDS, *shown: object) -> None:
    """Wait for something to happen, `what` says that it did not; `shown` is put into its braces."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SlurmError(what.format(*shown) + f" ({timeout_s:g} s)")
        time.sleep(0.1)
