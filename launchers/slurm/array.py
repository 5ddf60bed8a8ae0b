"""`python -m train -m optim.lr=1e-3,1e-2 hydra/launcher=slurm`: the runs of a multirun as one array job.

hydra-submitit-launcher, which this takes the place of, completes the array task of a run that fails, waits for ever for
one that dies, and requeues none. Here an element ends as the job of a single run does: see `launchers.slurm.script`.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from conf import entry
from conf.errors import ConfigError, LongrunError, Problem
from conf.registry import register
from data_pipeline.artifact import MANIFEST
from launchers import preflight
from launchers.slurm import cluster, jobs
from launchers.slurm.resources import Resources
from launchers.slurm.script import LOGS, Batch, Run


@register("hydra/launcher", "slurm", package="hydra.launcher")
@dataclass(frozen=True)
class ArrayConfig(Resources):
    """What each run of a multirun is given.

    Args:
        nodes: machines of each run.
        at_once: runs at the same time; 0: as many as Slurm allows.
        poll_s: seconds between two questions to Slurm.
    """

    nodes: int = 1
    at_once: int = 0
    poll_s: float = 5.0
    _target_: str = "hydra_plugins.longrun_slurm.SlurmLauncher"


class SlurmArray(Launcher):
    """Submits one array job, waits for it, and exits with 1 if a run failed."""

    def __init__(self, **settings: Any):
        node = OmegaConf.merge(OmegaConf.structured(ArrayConfig), settings)
        self.asked: ArrayConfig = OmegaConf.to_object(node)  # type: ignore[assignment]
        self.config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            failed = self._launch(job_overrides, initial_job_idx)
        except LongrunError as error:
            raise SystemExit(entry.tell(error)) from None
        if failed:
            raise SystemExit(1)
        returns = [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]
        for end in returns:
            end.return_value = 0
        return returns

    def _launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> int:
        """Returns how many runs failed.

        Raises:
            ConfigError: what Slurm, or a run's own configuration, would refuse.
            LiveJobError: a run has a job already.
        """
        module = _module()
        base = self._base(job_overrides[0])
        runs = []
        for number, overrides in enumerate(job_overrides, start=first):
            directory = base / str(number)
            given = [word for word in overrides if not word.startswith("run_dir=")]
            runs.append(Run(directory, [module, *given, f"run_dir={directory}"]))
        self._check(runs)
        asked = self.asked
        with jobs.claimed([run.directory for run in runs]):
            for run in runs:
                jobs.refuse_second(run.directory)
            job = Batch(asked, asked.nodes, runs, base.name, base / LOGS, at_once=asked.at_once).submit()
            numbers = [f"{job}_{element}" for element in range(len(runs))] if len(runs) > 1 else [job]
            for run, element in zip(runs, numbers, strict=True):
                jobs.Record.add(run, jobs.settings_of(asked), element)
        print(f"job {job}: {len(runs)} runs in {base}", flush=True)
        return self._wait(dict(zip(numbers, runs, strict=True)))

    def _base(self, overrides: Sequence[str]) -> Path:
        """The directory of the sweep: the runs' own, were there only one."""
        composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        return Path(str(composed.run_dir)).resolve()

    def _check(self, runs: Sequence[Run]) -> None:
        asked = self.asked
        found = asked.wrong("hydra.launcher.") + cluster.problems(asked, asked.nodes, "hydra.launcher.")
        ranks = asked.nodes * asked.ranks_per_node
        checks = [preflight.Check(run.directory.name, run.command, ranks, []) for run in runs]
        for name, problem in preflight.check(checks).items():
            found.append(Problem("run", name, f"would not start on {ranks} ranks:\n{jobs.indented(problem)}"))
        if found:
            raise ConfigError(found)

    def _wait(self, runs: dict[str, Run]) -> int:
        """Until every element has ended. An element that Slurm has forgotten is judged by its manifest."""
        waiting, failed = dict(runs), 0
        while waiting:
            for number, run in list(waiting.items()):
                job = cluster.news(number)
                if job and not job.ended:
                    continue
                del waiting[number]
                well = job.state == "COMPLETED" if job else (run.directory / MANIFEST).exists()
                failed += not well
                ended = "done" if well else f"{job.state if job else 'failed'}; see {run.logs}"
                print(f"{run.directory.name}: {' '.join(run.command[1:-1])}: {ended}", flush=True)
            if waiting:
                time.sleep(self.asked.poll_s)
        return failed


def _module() -> str:
    """What follows `python -m` on this process's command line."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "started as python -m ..."
    return spec.name.removesuffix(".__main__")
