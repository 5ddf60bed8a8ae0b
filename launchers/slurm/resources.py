"""What a job asks Slurm for, and how it is started again."""

import re
from dataclasses import dataclass, field
from typing import Any

from conf.errors import Problem
from conf.registry import register

EARLY_S = 60
"""Slurm's warning may come so much earlier than asked (sbatch(1), --signal)."""
DEFAULT_WARNING_S = 120
MEMORY = re.compile(r"\d+[KMGT]?")
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
RUNTIMES = ("pyxis", "apptainer")


def seconds(time: str) -> int | None:
    """Of a time limit as Slurm writes it, or None where it is none.

    "30" minutes, "30:00", "12:00:00", "1-12" (days and hours), "1-12:00", "1-12:00:00".
    """
    if not (match := TIME.fullmatch(time)):
        return None
    first, second, third = (int(match[part] or 0) for part in ("first", "second", "third"))
    if match["days"] is not None:
        return int(match["days"]) * 86400 + first * 3600 + second * 60 + third
    return first * 3600 + second * 60 + third if match["third"] else first * 60 + second


@dataclass(frozen=True)
class Resources:
    """What every job of a run is given, whoever submits it.

    Args:
        tasks_per_node: ranks on each node; 0: one for each GPU, or one.
        gpus_per_node: GPUs of each node; 0: none is asked for.
        cpus_per_task: cores of each rank; 0: Slurm's default, one.
        memory: of each node, for instance 64G (K, M, G, T: powers of 1,024; without one MiB); empty for the
            partition's own.
        time: limit of one start, as Slurm writes it: minutes, hours:minutes:seconds, days-hours, days-hours:minutes
            or days-hours:minutes:seconds; empty for the partition's own. A run that needs longer is requeued.
        partition: where the job runs, or several, as in a,b; empty for the cluster's default.
        account: who pays for it; empty for the user's default.
        qos: quality of service; empty for the user's default.
        constraint: features that its nodes must have.
        exclude: nodes that it must not get, for instance n[3-4].
        exclusive: share its nodes with no other job.
        container: image that the ranks run in; empty for none. It must hold Python and what Longrun needs; the code,
            the working directory and the run directory are mounted at their own paths.
        runtime: what runs the container: pyxis (srun's plugin for enroot) or apptainer.
        mounts: further directories that the container sees, as source or source:target.
        python: the interpreter of the ranks; empty for the one that submits, or the container's python3.
        environment: further variables. Secrets do not belong here: what is exported in the shell that submits is
            handed on by Slurm itself, and stands in no file.
        setup: lines of shell run before the ranks start, for instance "module load cuda".
        options: further options of sbatch, for instance {mail-type: END}.
        warning_s: seconds before the time limit at which the ranks get SIGUSR2, to write a last checkpoint.
        grace_s: seconds the other ranks have to end by themselves after one has; then they are killed.
        requeues: times in a row that the job requeues itself without a new checkpoint in between, after it stopped
            early (75) or lost a rank (76, or killed by a signal). Preemptions and lost nodes, after which Slurm itself
            requeues it, are not counted.
    """

    tasks_per_node: int = 0
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    memory: str = ""
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    exclusive: bool = False
    container: str = ""
    runtime: str = "pyxis"
    mounts: list[str] = field(default_factory=list)
    python: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    warning_s: int = DEFAULT_WARNING_S
    grace_s: int = 120
    requeues: int = 5

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    def wrong(self, prefix: str = "") -> list[Problem]:
        """What is wrong whatever the cluster.

        Args:
            prefix: of the keys: "launcher." in a lifecycle.
        """
        found = []
        for key in ("tasks_per_node", "gpus_per_node", "cpus_per_task", "requeues"):
            if getattr(self, key) < 0:
                found.append(Problem(prefix + key, getattr(self, key), "0 or more"))
        for key in ("warning_s", "grace_s"):
            if getattr(self, key) < 1:
                found.append(Problem(prefix + key, getattr(self, key), "seconds, 1 or more"))
        if self.memory and not MEMORY.fullmatch(self.memory):
            found.append(Problem(f"{prefix}memory", self.memory, "a number and K, M, G or T, for instance 64G"))
        if self.runtime not in RUNTIMES:
            found.append(Problem(f"{prefix}runtime", self.runtime, f"one of {', '.join(RUNTIMES)}"))
        return found + self._time_problems(prefix)

    def _time_problems(self, prefix: str) -> list[Problem]:
        if not self.time:
            return []
        limit_s = seconds(self.time)
        if limit_s is None:
            fix = "minutes (90), hours:minutes:seconds (24:00:00) or days-hours (7-0); in YAML in quotes"
            return [Problem(f"{prefix}time", self.time, fix)]
        if limit_s <= self.warning_s + EARLY_S:
            fix = (
                f"leaves no time to train: Slurm warns {self.warning_s} s ({prefix}warning_s) before it and up to "
                f"{EARLY_S} s early; give it more, or another warning_s"
            )
            return [Problem(f"{prefix}time", self.time, fix)]
        return []


@register("", "slurm_schema")
@dataclass(frozen=True)
class SlurmConfig(Resources):
    """Submit a run: `python -m launchers.slurm submit nodes=2 gpus_per_node=8 time=24:00:00 -- train experiment=...`.

    What stands after -- is run by every rank as `python -m ...`. It is checked first, here.

    Args:
        nodes: machines.
        min_nodes: go on with so few in the same job when others are lost: a torchrun agent on each node starts the
            ranks (see docs/failures.md, parallel=elastic); 0: the job is requeued and waits for `nodes` of them.
        name: what Slurm calls the job; empty for the name of the run's directory.
        dry_run: check everything and print the job's script, without submitting it.
    """

    nodes: int = 1
    min_nodes: int = 0
    name: str = ""
    dry_run: bool = False

    def wrong(self, prefix: str = "") -> list[Problem]:
        found = super().wrong(prefix)
        if self.nodes < 1:
            found.append(Problem("nodes", self.nodes, "1 or more"))
        if not 0 <= self.min_nodes <= self.nodes:
            found.append(Problem("min_nodes", self.min_nodes, f"0, or 1 to {self.nodes} (nodes)"))
        return found
