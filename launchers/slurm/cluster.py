"""What Slurm says of its partitions, nodes and jobs, by its own programs."""

import difflib
import getpass
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from conf.errors import LongrunError, Problem
from launchers.slurm.resources import Resources, seconds

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
"""States that a job does not leave by itself. Slurm calls a job that it starts again PENDING."""
LOST = {"BOOT_FAIL", "NODE_FAIL", "PREEMPTED"}
"""Those of them that are no fault of the job's."""
ANSWER_S = 120.0
"""What one of Slurm's programs is given; they wait for the controller themselves, for less (MessageTimeout)."""
PATIENCE_S = 600.0
"""How long who looks on bears that Slurm does not answer."""
_silent_since: list[float] = []

REASONS = {
    "Resources": "waits for nodes to be free",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for the jobs before it",
    "DependencyNeverSatisfied": "a job before it failed",
    "BeginTime": "starts again in a moment",
    "PartitionDown": "the partition takes no jobs",
    "PartitionInactive": "the partition takes no jobs",
    "ReqNodeNotAvail": "nodes are down or reserved",
    "QOSMaxJobsPerUserLimit": "as many jobs of yours run as the QOS allows",
    "AssocGrpCpuLimit": "the account's cores are used up",
    "AssocGrpGRES": "the account's GPUs are used up",
    "JobHeldUser": "held; scontrol release starts it",
    "JobHeldAdmin": "held by the administrator",
    "launch_failed_requeued_held": "its start failed; scontrol release starts it",
}
"""What squeue means by the reasons that are met most."""


class SlurmError(LongrunError):
    """Slurm is not there, or refused."""


@dataclass(frozen=True)
class Node:
    """A machine of a partition: its name, cores, memory in MiB, GPUs."""

    name: str
    cpus: int
    memory: int
    gpus: int


@dataclass(frozen=True)
class Partition:
    """A set of nodes with limits.

    Args:
        name, default: its name; whether it is the cluster's default.
        state: UP, or why it takes no job.
        time_s: longest time limit; None for none.
        most_nodes: of one job; None for none.
        nodes: its machines.
    """

    name: str
    default: bool
    state: str
    time_s: int | None
    most_nodes: int | None
    nodes: list[Node]


@dataclass(frozen=True)
class Job:
    """A job that Slurm knows.

    Args:
        number: 12, or 12_3 for an element of an array.
        state: PENDING, RUNNING, COMPLETED...
        reason: why it is in this state, as squeue says it.
        restarts: times it was started again.
        comment: for our jobs, the run directory.
        nodes: where it runs, or ran.
        code: exit code of its script.
    """

    number: str
    state: str
    reason: str = ""
    restarts: int = 0
    comment: str = ""
    nodes: str = ""
    code: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def why(self) -> str:
        """The reason in words, where there is one."""
        return "" if self.reason == "None" else REASONS.get(self.reason, self.reason)


def ask(*command: str, text: str | None = None) -> str:
    """What one of Slurm's programs answers.

    Raises:
        SlurmError: there is no such program, no controller, or it refused.
    """
    try:
        answer = subprocess.run(command, input=text, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command[0]} on this machine: submit where Slurm is (a login node), or run here with "
            "`python -m ...` or torchrun."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} gave no answer within {ANSWER_S:g} s: is the controller up?") from error
    if answer.returncode:
        raise SlurmError(f"{command[0]}: {_said(answer.stderr) or f'exit code {answer.returncode}'}")
    return answer.stdout


def _said(errors: str) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in errors.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def partitions() -> list[Partition]:
    """All of the cluster.

    Raises:
        SlurmError: there is no Slurm, or its controller does not answer.
    """
    shown = ask("sinfo", "--noheader", "--all", "--Node", "--format=%R|%N|%c|%m|%G")
    nodes: dict[str, list[Node]] = {}
    for line in shown.splitlines():
        partition, name, cpus, memory, generic = line.strip().split("|", 4)
        nodes.setdefault(partition, []).append(Node(name, int(cpus), int(memory), _gpus(generic)))
    found = []
    for line in ask("scontrol", "--oneliner", "--all", "show", "partition").splitlines():
        fields = _fields(line)
        name, most = fields["PartitionName"], fields.get("MaxNodes", "")
        limit_s = seconds(fields.get("MaxTime", ""))
        state, default = fields.get("State", "UP"), fields.get("Default") == "YES"
        found.append(
            Partition(name, default, state, limit_s, int(most) if most.isdigit() else None, nodes.get(name, []))
        )
    return found


def _gpus(generic: str) -> int:
    """Of a list of generic resources such as gpu:a100:8(S:0-1),nvme:1."""
    return sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,(]+:)?(\d+)", generic))


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def job(number: str) -> Job | None:
    """What Slurm knows of a job, or None once it has forgotten it (MinJobAge of slurm.conf after its end)."""
    try:
        lines = ask("scontrol", "--oneliner", "show", "job", number).splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    fields = _fields(lines[0])
    comment = re.search(r" Comment=(.*?)(?: +\w+=|\s*$)", lines[0])
    return Job(
        number,
        fields["JobState"],
        fields.get("Reason", ""),
        int(fields.get("Restarts", 0)),
        comment[1] if comment else "",
        fields.get("NodeList", "").replace("(null)", ""),
        int(fields.get("ExitCode", "0:0").split(":")[0]),
    )


def news(number: str) -> Job | None:
    """`job`, for one who looks on: a job is UNKNOWN while Slurm does not answer, which is said once.

    Raises:
        SlurmError: it has not answered for `PATIENCE_S`.
    """
    try:
        found = job(number)
    except SlurmError as error:
        if not _silent_since:
            _silent_since.append(time.monotonic())
            print(f"Slurm does not answer ({error}); it is asked again for {PATIENCE_S:g} s.", file=sys.stderr)
        if time.monotonic() - _silent_since[0] > PATIENCE_S:
            raise
        return Job(number, "UNKNOWN")
    _silent_since.clear()
    return found


def live() -> list[Job]:
    """This user's jobs that have not ended, elements of arrays one by one."""
    shown = ask("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T|%r|%k")
    found = []
    for line in shown.splitlines():
        number, state, reason, comment = line.strip().split("|", 3)
        found.append(Job(number, state, reason, comment=comment.replace("(null)", "")))
    return found


def problems(resources: Resources, nodes: int, prefix: str = "") -> list[Problem]:
    """What a job asks for that this cluster could never give.

    Args:
        resources, nodes: what it asks for.
        prefix: of the keys.

    Raises:
        SlurmError: see `partitions`.
    """
    known = {partition.name: partition for partition in partitions()}
    defaults = [name for name, partition in known.items() if partition.default]
    wanted = resources.partition or (defaults[0] if defaults else "")
    names = wanted.split(",")  # of several Slurm takes the one where the job starts first
    absent = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            fix = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(known)}"
            said = "there is no such partition" if name else "the cluster has no default partition"
            absent.append(Problem(f"{prefix}partition", name or "''", f"{said}; {fix}"))
    return absent or min((_problems_in(known[name], resources, nodes, prefix) for name in names), key=len)


def _problems_in(partition: Partition, resources: Resources, nodes: int, prefix: str) -> list[Problem]:
    found = []
    if partition.state != "UP":
        found.append(Problem(f"{prefix}partition", partition.name, f"takes no jobs, it is {partition.state}"))
    limit_s = seconds(resources.time) if resources.time else None
    if limit_s and partition.time_s and limit_s > partition.time_s:
        fix = f"partition {partition.name} allows {duration(partition.time_s)} at most; the run is requeued and goes on"
        found.append(Problem(f"{prefix}time", resources.time, fix))
    return found + _size_problems(resources, nodes, partition, prefix)


def _size_problems(resources: Resources, nodes: int, partition: Partition, prefix: str) -> list[Problem]:
    found = []
    name, most = partition.name, min(len(partition.nodes), partition.most_nodes or len(partition.nodes))
    if nodes > most:
        found.append(Problem("nodes", nodes, f"partition {name} has {most}"))
    asked = {
        f"{prefix}gpus_per_node": (resources.gpus_per_node, "gpus", "GPUs"),
        f"{prefix}tasks_per_node": (resources.ranks_per_node * max(1, resources.cpus_per_task), "cpus", "cores"),
        f"{prefix}memory": (_mebibytes(resources.memory), "memory", "MiB"),
    }
    fitting = partition.nodes
    for key, (amount, attribute, unit) in asked.items():
        largest = max((getattr(node, attribute) for node in partition.nodes), default=0)
        fitting = [node for node in fitting if getattr(node, attribute) >= amount]
        if amount > largest:
            shown = resources.memory if attribute == "memory" else resources.ranks_per_node
            shown = resources.gpus_per_node if attribute == "gpus" else shown
            found.append(
                Problem(key, shown, f"asks for {amount} {unit}; no node of partition {name} has more than {largest}")
            )
    if not found and len(fitting) < nodes:
        fix = f"partition {name} has {len(fitting)} with so many GPUs, cores and so much memory"
        found.append(Problem("nodes", nodes, fix))
    return found


def _mebibytes(memory: str) -> int:
    if not re.fullmatch(r"\d+[KMGT]?", memory):
        return 0
    scale = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    return int(int(memory.rstrip("KMGT")) * scale.get(memory[-1], 1))


def duration(total_s: int) -> str:
    """As Slurm writes it: 1-02:03:04."""
    days, rest = divmod(total_s, 86400)
    text = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{text}" if days else text
