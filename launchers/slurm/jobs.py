"""The jobs of a run: submitted, found again by its directory, told to stop, started again."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError, LongrunError, Problem
from data_pipeline.artifact import MANIFEST, locked, write_atomically
from launchers import preflight
from launchers.graph import importable
from launchers.slurm import cluster
from launchers.slurm.cluster import Job, SlurmError
from launchers.slurm.resources import Resources, SlurmConfig
from launchers.slurm.script import CANCELLED, LOGS, Batch, Run

RECORD = "slurm.json"
POLL_S = 1.0
STOP_S = 5.0
"""Between two requests to stop: the first may come before the ranks are there to hear it."""


class LiveJobError(LongrunError):
    """A job for this run directory is pending or running."""

    exit_code = 73


@dataclass(frozen=True)
class Record:
    """What is kept in the run directory of its jobs.

    Args:
        command: what follows `python -m`.
        settings: of `SlurmConfig`, plain.
        cwd: where it was submitted.
        jobs: their numbers, oldest first.
    """

    command: list[str]
    settings: dict[str, Any]
    cwd: str
    jobs: list[str]

    @classmethod
    def read(cls, directory: Path) -> "Record | None":
        try:
            return cls(**json.loads((directory / LOGS / RECORD).read_text()))
        except FileNotFoundError:
            return None

    @classmethod
    def add(cls, run: Run, settings: dict[str, Any], number: str) -> None:
        """Keep a job that was just submitted."""
        earlier = cls.read(run.directory)
        numbers = [*(earlier.jobs if earlier else []), number]
        record = cls(run.command, settings, str(Path.cwd()), numbers)
        write_atomically(run.logs / RECORD, json.dumps(asdict(record), indent=1) + "\n")


def submit(config: SlurmConfig, resolved: dict[str, Any], command: Sequence[str]) -> str:
    """Check all there is to check, then submit; with `dry_run` only check. Returns the script or the job's number,
    in a sentence.

    Raises:
        ConfigError: every problem of the job, and of the command's own configuration.
        LiveJobError: the run has a job already; names it.
        SlurmError: sbatch refused.
    """
    run = check(config, command)
    name = config.name or run.directory.name
    batch = Batch(config, config.nodes, [run], name, run.logs, min_nodes=config.min_nodes)
    text = batch.text()
    if problem := never_starts(text):
        raise ConfigError([problem])
    if config.dry_run:
        return f"{text}\nThe job can start; nothing was submitted."
    with claimed([run.directory]):
        refuse_second(run.directory)
        number = batch.submit()
        Record.add(run, {key: value for key, value in resolved.items() if key in asdict(config)}, number)
    return f"job {number} for {run.directory} is submitted"


def check(config: SlurmConfig, command: Sequence[str]) -> Run:
    """The run that a command line makes.

    Raises:
        ConfigError: every problem of the job, and of the command's own configuration.
    """
    found = config.wrong()
    try:
        found += cluster.problems(config, config.nodes)
    except SlurmError as error:
        found.append(Problem("slurm", "absent", str(error)))
    run_dir = ""
    if not command or not importable(command[0]):
        given = " ".join(command) or "''"
        found.append(Problem("command", given, "what follows `--` is a module of ours, as in: -- train experiment=..."))
    else:
        ranks = config.nodes * config.ranks_per_node
        answer = preflight.answers([preflight.Check("run", list(command), ranks, [])])["run"]
        run_dir = answer.run_dir
        if answer.problem:
            found.append(
                Problem("command", command[0], f"would not start on {ranks} ranks:\n{indented(answer.problem)}")
            )
        elif not run_dir:
            found.append(Problem("command", command[0], "has no run_dir, and by its artifact a job is judged"))
    if found:
        raise ConfigError(found)
    return Run(Path(run_dir).resolve(), list(command))


def never_starts(script: str) -> Problem | None:
    """What Slurm itself says against a script (sbatch --test-only)."""
    try:
        cluster.ask("sbatch", "--test-only", text=script)
    except SlurmError as error:
        return Problem("slurm", "refuses", f"the job could never start. {error}")
    return None


@contextmanager
def claimed(directories: Sequence[Path]) -> Iterator[None]:
    """Between the look for live jobs of these runs and the submission of others, no other process submits one.

    Raises:
        LiveRunError: another process is doing so.
    """
    with ExitStack() as held:
        for directory in directories:
            held.enter_context(locked(directory / LOGS))
        yield


def refuse_second(directory: Path) -> None:
    """
    Raises:
        LiveJobError: a job for the directory is pending or running.
    """
    if job := live_job(directory):
        raise LiveJobError(
            f"{directory} has job {job.number} already ({job.state}): wait for it, or stop it with "
            f"`python -m launchers.slurm cancel {directory}`."
        )


def live_job(directory: Path) -> Job | None:
    """The job of a run that is pending or running."""
    record = Record.read(directory)
    numbers = record.jobs if record else []
    return next((job for job in cluster.live() if job.number in numbers or job.comment == str(directory)), None)


def last_job(directory: Path) -> Job | None:
    """The newest job of a run, live or ended; None where there was none, or Slurm has forgotten it."""
    if job := live_job(directory):
        return cluster.job(job.number)
    record = Record.read(directory)
    return cluster.job(record.jobs[-1]) if record else None


def run_of(given: str) -> Path:
    """The run directory that a person means: itself, or the number of one of its jobs.

    Raises:
        SlurmError: there is no such job, or no job was ever submitted for the directory.
    """
    if re.fullmatch(r"\d+(_\d+)?", given) and not Path(given).exists():
        job = cluster.job(given)
        if job is None or not job.comment:
            raise SlurmError(f"Slurm knows no job {given} of ours: give the run directory.")
        there = elements(Path(job.comment))
        if "_" not in given and any(number.startswith(f"{given}_") for number in there):
            raise SlurmError(f"job {given} is an array: give one of its elements, as in {given}_0, or a run directory.")
        return there.get(given, Path(job.comment))
    directory = Path(given).resolve()
    if Record.read(directory) is None and live_job(directory) is None:
        raise SlurmError(
            f"no job was submitted for {directory}: `python -m launchers.slurm status` shows those there are."
        )
    return directory


def elements(folder: Path) -> dict[str, Path]:
    """The jobs of runs that an array was submitted for, and their directories, by the runs' own records.

    Args:
        folder: of the array's scripts, beside the runs'.
    """
    found = {}
    for file in folder.parent.glob(f"*/{LOGS}/{RECORD}"):
        directory = file.parent.parent
        if record := Record.read(directory):
            found.update(dict.fromkeys(record.jobs, directory))
    return found


def cancel(directory: Path, wait_s: float, now: bool = False) -> Iterator[str]:
    """End the job of a run; first let it write a checkpoint. Says what it does.

    Args:
        directory: the run's.
        wait_s: seconds it is given; then it is ended as it is.
        now: end it as it is.
    """
    job = live_job(directory)
    if job is None:
        yield f"{directory} has no job that is pending or running."
        return
    (directory / LOGS / CANCELLED).touch()
    if now or job.state == "PENDING":
        cluster.ask("scancel", job.number)
        yield f"job {job.number} is cancelled"
        return
    yield f"job {job.number} is asked to write a checkpoint and end"
    deadline, asked = time.monotonic() + wait_s, -STOP_S
    while (job := live_job(directory)) and job.state != "PENDING":
        if time.monotonic() > deadline:
            yield f"it did not end within {wait_s:g} s: it is ended as it is"
            break
        if time.monotonic() - asked >= STOP_S and job.state == "RUNNING":
            asked = time.monotonic()
            ask_to_stop(job.number)
        time.sleep(POLL_S / 4)
    if job:
        cluster.ask("scancel", job.number)
    yield "it is cancelled; `resume` goes on from the newest checkpoint"


def ask_to_stop(number: str) -> None:
    """Have the ranks of a running job write a checkpoint and end; the mark CANCELLED keeps it from being requeued."""
    with suppress(SlurmError):  # it has just ended
        cluster.ask("scancel", "--signal=USR2", number)


def resume(directory: Path, overrides: Sequence[str]) -> str:
    """Submit the run's command again, with the settings it had, or others.

    Args:
        directory: the run's.
        overrides: settings that change, as in time=48:00:00.

    Raises:
        SlurmError: no job was ever submitted for the directory.
        ConfigError, LiveJobError: as in `submit`.
    """
    record = Record.read(directory)
    if record is None:
        raise SlurmError(f"{directory} has no {LOGS}/{RECORD}: submit it first.")
    if (directory / MANIFEST).exists():
        return f"{directory} is finished: nothing to do"
    config = changed(record.settings, overrides)
    return submit(config, asdict(config), record.command)


def settings_of(resources: Resources) -> dict[str, Any]:
    """What `resume` needs of what a job was submitted with, by whichever launcher."""
    known = {field.name for field in fields(SlurmConfig)}
    return {key: value for key, value in asdict(resources).items() if key in known}


def changed(settings: dict[str, Any], overrides: Sequence[str]) -> SlurmConfig:
    """Settings with others in their place, read as Hydra reads a command line: 48:00:00 is a text (in YAML, a number).

    Raises:
        SlurmError: there is no such setting, or it takes no such value.
    """
    others = OmegaConf.create()
    try:
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            OmegaConf.update(others, override.key_or_group, override.value())
        node = OmegaConf.merge(OmegaConf.structured(SlurmConfig), settings, others)
    except (HydraException, OmegaConfBaseException) as error:
        raise SlurmError(f"{' '.join(overrides)}: {error}") from error
    config = OmegaConf.to_object(node)
    assert isinstance(config, SlurmConfig)
    return config


def indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())
