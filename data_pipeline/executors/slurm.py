"""Pieces as array jobs of Slurm. Its nodes must see run_dir and the code under the same paths."""

import getpass
import hashlib
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import Problem
from conf.registry import register
from data_pipeline.executors import sealed
from data_pipeline.executors.base import GO_ON, Executor, Job, PieceError

ROOT = Path(__file__).parents[2]
"""Where the code is."""
LARGEST_ARRAY = 1000
"""Elements of an array job; Slurm's own limit (MaxArraySize) is 1,001 if not set. Each works on several pieces if
there are more."""
JOB, ERRORS, OUTPUT = "job.sealed", "errors", "slurm"
"""Beside the logs: the work, what went wrong by piece, what the elements printed."""


@register("executor", "slurm")
@dataclass(frozen=True)
class Slurm(Executor):
    """An array job per step, which this process waits for. Slurm starts the pieces of a lost node again by itself.

    datatrove's own executor returns at once, and a second run would submit the same pieces again beside the first:
    here, a run that was killed finds its jobs by their name and waits for them.

    Args:
        partition: where jobs run; empty for the cluster's default.
        minutes: time limit of a piece, in minutes; 0 for the partition's own.
        cpus: cores of a piece.
        memory_gb: memory of a piece, in GB (Slurm's, 2^30 bytes); 0 for the partition's own.
        options: further options of sbatch, such as {account: mine, qos: low}.
        poll_s: time between two questions to Slurm, in seconds.
    """

    partition: str = ""
    minutes: int = 0
    cpus: int = 1
    memory_gb: int = 0
    options: dict[str, str] = field(default_factory=dict)
    poll_s: float = 5.0

    def problems(self) -> list[Problem]:
        found = [
            Problem(f"executor.{key}", getattr(self, key), "0 (the partition's own) or more")
            for key in ("minutes", "memory_gb")
            if getattr(self, key) < 0
        ]
        found += [] if self.cpus >= 1 else [Problem("executor.cpus", self.cpus, "at least 1")]
        return found + ([] if self.poll_s > 0 else [Problem("executor.poll_s", self.poll_s, "more than 0 seconds")])

    def at_once(self, workers: int) -> int:
        return workers or 2**31

    def run(self, job: Job, pieces: Sequence[int], workers: int) -> None:
        logs = job.directory.resolve()
        name = f"longrun-{hashlib.sha256(str(logs).encode()).hexdigest()[:12]}"
        self._wait(name)  # for the jobs of a run that was killed: they work on the same pieces
        pieces = [piece for piece in pieces if not job.complete(piece)]
        if not pieces:
            return
        elements = min(len(pieces), LARGEST_ARRAY)
        key = secrets.token_hex()
        number = self._submit(job, name, [pieces[element::elements] for element in range(elements)], workers, key)
        print(f"  {len(pieces)} pieces of {logs.parent.name} are with Slurm as job {number}", flush=True)
        self._wait(name)
        lacking = {piece: place % elements for place, piece in enumerate(pieces) if not job.complete(piece)}
        for piece in lacking:
            if (error := logs / ERRORS / str(piece)).exists():
                raise sealed.read(error, key)
        if lacking:
            states = "; ".join(
                f"piece {piece}: {_state(f'{number}_{element}')}" for piece, element in list(lacking.items())[:3]
            )
            raise PieceError(
                f"{logs}: {len(lacking)} of {len(pieces)} pieces came to no end in Slurm job {number}: "
                f"{states}. Output is in {logs / OUTPUT}. After OUT_OF_MEMORY or signal 9 raise executor.memory_gb, "
                f"after TIMEOUT executor.minutes; a disk that is full leaves no output. {GO_ON}"
            )

    def _submit(self, job: Job, name: str, shares: list[list[int]], workers: int, key: str) -> str:
        """Submit an array job; returns its number."""
        logs = job.directory.resolve()
        shutil.rmtree(logs / ERRORS, ignore_errors=True)
        for directory in (logs / ERRORS, logs / OUTPUT):
            directory.mkdir(parents=True, exist_ok=True)
        sealed.write(logs / JOB, (job, shares), key)
        limit = f"%{workers}" if workers < len(shares) else ""
        settings = {
            "job-name": name,
            "array": f"0-{len(shares) - 1}{limit}",
            "output": str(logs / OUTPUT / "%a.txt"),
            "open-mode": "append",
            "chdir": str(Path.cwd()),
            "cpus-per-task": str(self.cpus),
            "partition": self.partition,
            "time": str(self.minutes or ""),
            "mem": f"{self.memory_gb}G" if self.memory_gb else "",
            **self.options,
        }
        given = [f"--{key}={value}" for key, value in settings.items() if value]
        command = shlex.join([sys.executable, "-m", "data_pipeline.engine.element", str(logs / JOB)])
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, sealed.VARIABLE: key}
        try:
            answer = subprocess.run(
                ["sbatch", "--parsable", "--requeue", *given],
                input=f"#!/bin/sh\nexec {command}\n",
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
        except FileNotFoundError as error:
            raise PieceError("executor=slurm needs sbatch: start it where Slurm is, or take executor=local.") from error
        except subprocess.CalledProcessError as error:
            raise PieceError(f"sbatch {' '.join(given)} refused: {error.stderr.strip()}; see executor.*") from error
        return answer.stdout.strip().split(";")[0]

    def _wait(self, name: str) -> None:
        """Until no job of this name is pending or running."""
        command = ["squeue", "--noheader", f"--name={name}", f"--user={getpass.getuser()}", "--format=%A"]
        while True:
            try:
                answer = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise PieceError(
                    "executor=slurm needs squeue: start it where Slurm is, or take executor=local."
                ) from error
            if answer.returncode == 0 and not answer.stdout.strip():  # a controller that is away is asked again
                return
            time.sleep(self.poll_s)


def _state(element: str) -> str:
    """How an element of an array ended."""
    answer = subprocess.run(["scontrol", "show", "job", element], capture_output=True, text=True).stdout
    fields = dict(word.split("=", 1) for word in answer.split() if "=" in word)
    state, code = fields.get("JobState", "forgotten by Slurm"), fields.get("ExitCode", "")
    return f"{state}, exit code:signal {code}" if code else state
