"""Stages of a lifecycle as jobs of Slurm: a chain in which each waits for those it needs, and which stops where one
fails.

The chain is submitted whole, so it goes on without the lifecycle's process. That looks on, and judges each stage by its
manifest as it does elsewhere.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.errors import ConfigError, Problem
from conf.registry import register
from launchers.base import DONE, LOST, STOPPED_EARLY, Ahead, Ended, Output
from launchers.slurm import cluster, jobs
from launchers.slurm.resources import Resources
from launchers.slurm.script import CANCELLED, KILLED, LOGS, Batch, Run

RECENT_BYTES = 1 << 16
"""Of what the ranks of a job printed before it was joined."""

_ahead: dict[Path, "SlurmJob"] = {}
"""Jobs that this process has submitted and not yet joined."""


@register("launcher", "slurm")
@dataclass(frozen=True)
class Slurm(Resources):
    """Each stage a job of Slurm, on as many nodes as its ranks need.

    Args:
        tasks_per_node: ranks on each node; 0: one for each GPU, or all of a stage's on one node.
        detach: submit the chain and leave; the same command later joins it.
        poll_s: seconds between two questions to Slurm.
    """

    detach: bool = False
    poll_s: float = 2.0

    def problems(self) -> list[Problem]:
        found = self.wrong("launcher.")
        if self.poll_s <= 0:
            found.append(Problem("launcher.poll_s", self.poll_s, "a number of seconds above 0"))
        return found

    def start(self, command: Sequence[str], processes: int, output: Output) -> "SlurmJob":
        """Join the stage's job, or submit one where there is none.

        Raises:
            ConfigError: the cluster could never give what the stage asks for.
        """
        run = Run(_run_dir(command), list(command))
        joined = _ahead.pop(run.directory, None)
        if job := jobs.live_job(run.directory):
            recent = {file: max(0, size - RECENT_BYTES) for file, size in _sizes(run).items()}
            joined = joined or SlurmJob(job.number, run, recent)
        elif joined is None:
            joined = self._submit(Ahead(run.directory.name, run.directory, command, processes, [], False), "")
        joined.output, joined.poll_s = output, self.poll_s
        return joined

    def ahead(self, stages: Sequence[Ahead]) -> dict[str, str]:
        if found := self._cluster_problems(stages):
            raise ConfigError(found)
        numbers: dict[str, str] = {}
        for stage in stages:
            if job := jobs.live_job(stage.directory):
                numbers[stage.name] = job.number
                continue
            waits = [numbers[other] for other in stage.after]
            after = f"{'afterany' if stage.always else 'afterok'}:{':'.join(waits)}" if waits else ""
            _ahead[stage.directory] = self._submit(stage, after)
            numbers[stage.name] = _ahead[stage.directory].number
        return {name: f"job {number}" for name, number in numbers.items()}

    def together(self, name: str, stages: Sequence[Ahead], at_once: int) -> str:
        if found := self._cluster_problems(stages):
            raise ConfigError(found)
        new = [stage for stage in stages if not jobs.live_job(stage.directory)]
        if not new:
            return ""
        nodes, resources = self._size(new[0].processes)
        runs = [Run(stage.directory, list(stage.command)) for stage in new]
        before = [_sizes(run) for run in runs]
        folder = runs[0].directory.parent / LOGS
        number = Batch(resources, nodes, runs, name, folder, at_once=at_once).submit()
        for element, run in enumerate(runs):
            own = f"{number}_{element}" if len(runs) > 1 else number
            self._keep(run, own, nodes, resources)
            _ahead[run.directory] = SlurmJob(own, run, before[element])
        return f"job {number}"

    def _cluster_problems(self, stages: Sequence[Ahead]) -> list[Problem]:
        found: list[Problem] = []
        for stage in stages:
            nodes, resources = self._size(stage.processes)
            if nodes * resources.ranks_per_node != stage.processes:
                fix = f"a multiple of the {resources.ranks_per_node} ranks of each node (launcher.tasks_per_node)"
                found.append(Problem(f"stages.{stage.name}.processes", stage.processes, fix))
            found += [p for p in cluster.problems(resources, nodes, "launcher.") if p not in found]
        return found

    def _size(self, processes: int) -> tuple[int, Resources]:
        """Nodes, and what each gives."""
        per_node = min(processes, self.tasks_per_node or self.gpus_per_node or processes)
        gpus = min(self.gpus_per_node, per_node) if not self.tasks_per_node else self.gpus_per_node
        return math.ceil(processes / per_node), replace(self, tasks_per_node=per_node, gpus_per_node=gpus)

    def _submit(self, stage: Ahead, after: str) -> "SlurmJob":
        nodes, resources = self._size(stage.processes)
        run = Run(stage.directory, list(stage.command))
        before = _sizes(run)
        number = Batch(resources, nodes, [run], stage.name, run.logs, after=after).submit()
        self._keep(run, number, nodes, resources)
        return SlurmJob(number, run, before)

    def _keep(self, run: Run, number: str, nodes: int, resources: Resources) -> None:
        jobs.Record.add(run, jobs.settings_of(resources) | {"nodes": nodes}, number)


@dataclass
class SlurmJob:
    """The job of one stage.

    Args:
        number: of the job.
        run: what it runs.
        read: bytes of each rank's output that are not passed on, or were already.
    """

    number: str
    run: Run
    read: dict[Path, int]
    output: Output = field(init=False)
    poll_s: float = field(init=False)
    asked_s: float = 0.0
    stopping: bool = False

    def poll(self) -> Ended | None:
        if time.monotonic() - self.asked_s < self.poll_s:
            return None
        self.asked_s = time.monotonic()
        job = cluster.job(self.number)
        self._pass_on()
        if job is None:  # forgotten: its manifest says what became of it
            return Ended(DONE)
        if not job.ended:
            if self.stopping:
                self._ask()
            return None
        if job.state == "COMPLETED":
            return Ended(DONE)
        if self.stopping:
            return Ended(STOPPED_EARLY)
        code = LOST if job.code in KILLED or job.state == "NODE_FAIL" else job.code or 1
        return Ended(code, f"job {self.number} ended as {job.state} with exit code {job.code}")

    def stop(self) -> None:
        self.stopping = True
        (self.run.logs / CANCELLED).touch()
        self._ask()

    def kill(self) -> None:
        self.stopping = True
        cluster.ask("scancel", self.number)

    def _ask(self) -> None:
        job = cluster.job(self.number)
        if job and job.state == "PENDING":
            cluster.ask("scancel", self.number)
        elif job and job.state == "RUNNING":
            jobs.ask_to_stop(self.number)

    def _pass_on(self) -> None:
        for file in sorted(self.run.logs.glob("rank-*.log")):
            with open(file, "rb") as stream:
                stream.seek(self.read.get(file, 0))
                whole = stream.read()
            whole = whole[: whole.rfind(b"\n") + 1]
            self.read[file] = self.read.get(file, 0) + len(whole)
            rank = int(file.stem.removeprefix("rank-"))
            for line in whole.decode(errors="replace").splitlines():
                self.output(rank, line)


def _sizes(run: Run) -> dict[Path, int]:
    return {file: file.stat().st_size for file in run.logs.glob("rank-*.log")}


def _run_dir(command: Sequence[str]) -> Path:
    """Every stage's command names it."""
    (given,) = [word.removeprefix("run_dir=") for word in command if word.startswith("run_dir=")]
    return Path(given.strip("'")).resolve()
