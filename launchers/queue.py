"""Stages of a lifecycle as jobs of Slurm: a chain in which each waits for those it needs, and which stops where one
fails.

The chain is submitted whole, so it goes on without the lifecycle's process. That looks on, and judges each stage by its
manifest as it does elsewhere.
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.errors import ConfigError, Problem
from conf.registry import register
from data_pipeline.artifact import MANIFEST
from launchers.base import DONE, LOST, STOPPED_EARLY, Ahead, Ended, Output
from launchers.slurm import cluster, jobs
from launchers.slurm.cluster import SlurmError
from launchers.slurm.resources import Resources
from launchers.slurm.script import CANCELLED, GIVEN_UP, KILLED, LOGS, Batch, Run

RECENT_BYTES = 1 << 16
"""Of what the ranks of a job printed before it was joined."""

_ahead: dict[Path, "SlurmJob"] = {}
"""Jobs that this process has submitted and not yet joined."""
_waiting: dict[Path, Ahead] = {}
"""Stages that are in the queue, whoever submitted them, and that this process has not yet started."""


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
        _waiting.pop(run.directory, None)
        with jobs.claimed([run.directory]):
            if job := jobs.live_job(run.directory):
                recent = {file: max(0, size - RECENT_BYTES) for file, size in _sizes(run).items()}
                joined = joined or SlurmJob(job.number, run, recent)
            elif joined is None or joined.was_let_go():
                joined = self._submit(Ahead(run.directory.name, run.directory, command, processes, [], False), "")
                self._put_behind(run.directory)
        joined.output, joined.poll_s = output, self.poll_s
        return joined

    def ahead(self, stages: Sequence[Ahead]) -> dict[str, str]:
        if found := self._cluster_problems(stages):
            raise ConfigError(found)
        numbers: dict[str, str] = {}
        for stage in stages:
            with jobs.claimed([stage.directory]):
                _waiting[stage.directory] = stage
                if job := jobs.live_job(stage.directory):
                    numbers[stage.name] = job.number
                    continue
                _ahead[stage.directory] = self._submit(stage, _after(stage, [numbers[other] for other in stage.after]))
                numbers[stage.name] = _ahead[stage.directory].number
        return {name: f"job {number}" for name, number in numbers.items()}

    def end(self, directory: Path, now: bool = False) -> None:
        if job := jobs.live_job(directory):
            (directory / LOGS / CANCELLED).touch()
            if now or job.state == "PENDING":
                cluster.ask("scancel", job.number)
            else:
                jobs.ask_to_stop(job.number)

    def together(self, name: str, stages: Sequence[Ahead], at_once: int) -> str:
        if found := self._cluster_problems(stages):
            raise ConfigError(found)
        with jobs.claimed([stage.directory for stage in stages]):
            _waiting.update({stage.directory: stage for stage in stages})
            new = [stage for stage in stages if not jobs.live_job(stage.directory)]
            return self._submit_together(name, new, at_once) if new else ""

    def withdraw(self, now: bool) -> None:
        for directory in reversed(list(_waiting)):  # else what waits for the end of others, however they end, begins
            with suppress(SlurmError):
                self.end(directory, now)

    def _put_behind(self, again: Path) -> None:
        """Submit what waited for a stage anew, behind that one's new job: Slurm has let it go, or does so now."""
        behind = {again}
        for directory, stage in list(_waiting.items()):
            needs = [directory.parent / other for other in stage.after]
            if not behind.intersection(needs):
                continue
            behind.add(directory)
            with jobs.claimed([directory]):
                if job := jobs.live_job(directory):
                    cluster.ask("scancel", job.number)
                live = {need: job.number for need in needs if (job := jobs.live_job(need))}
                _ahead.pop(directory, None)
                if stage.always or all(need in live or (need / MANIFEST).exists() for need in needs):
                    _ahead[directory] = self._submit(stage, _after(stage, list(live.values())))

    def _submit_together(self, name: str, new: Sequence[Ahead], at_once: int) -> str:
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
    killing: bool = False

    def poll(self) -> Ended | None:
        if time.monotonic() - self.asked_s < self.poll_s:
            return None
        self.asked_s = time.monotonic()
        job = cluster.news(self.number)
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
        how = f"job {self.number} ended as {job.state} with exit code {job.code}"
        if (self.run.logs / GIVEN_UP).exists():  # it was started again often enough
            return Ended(1, f"{how}, after as many starts in vain as requeues allows")
        return Ended(LOST if job.code in KILLED or job.state in cluster.LOST else job.code or 1, how)

    def was_let_go(self) -> bool:
        """Whether Slurm cancelled it, as it does where a job that it waits for did not end well; not a person."""
        job = cluster.news(self.number)
        return job is not None and job.state == "CANCELLED" and not (self.run.logs / CANCELLED).exists()

    def stop(self) -> None:
        self.stopping = True
        (self.run.logs / CANCELLED).touch()
        self._ask()

    def kill(self) -> None:
        self.stopping = self.killing = True
        self._ask()

    def _ask(self) -> None:
        job = cluster.news(self.number)
        if job and (self.killing or job.state == "PENDING"):
            with suppress(SlurmError):  # it has just ended, or is asked again at the next look
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


def _after(stage: Ahead, numbers: Sequence[str]) -> str:
    """Slurm's dependency on these jobs."""
    return f"{'afterany' if stage.always else 'afterok'}:{':'.join(numbers)}" if numbers else ""


def _sizes(run: Run) -> dict[Path, int]:
    return {file: file.stat().st_size for file in run.logs.glob("rank-*.log")}


def _run_dir(command: Sequence[str]) -> Path:
    """Every stage's command names it."""
    (given,) = [word.removeprefix("run_dir=") for word in command if word.startswith("run_dir=")]
    return Path(given.strip("'")).resolve()
