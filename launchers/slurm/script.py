"""The script of a job, made and submitted by submitit's SlurmExecutor, and what it does when its ranks have ended.

Of submitit we use the script and the submission. Its own way to run a function (pickles both ways, a handler of
signals that requeues) is not used: the ranks are plain processes, so that exit codes and signals are theirs, and no
pickle says how a job ended.

    every rank ended with 0         the job is COMPLETED, if the artifact's manifest is there
    one failed                      the job is FAILED, with that rank's code, at once
    stopped early, or one was lost  the job is requeued, `requeues` times in a row without a new checkpoint
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.checkpoints import CHECKPOINTS
from data_pipeline.artifact import MANIFEST
from launchers.base import LOST, STOPPED_EARLY
from launchers.slurm.resources import Resources

if TYPE_CHECKING:
    from submitit import SlurmExecutor

ROOT = Path(__file__).parents[2]
"""Where the code is."""
LOGS = "logs"
CANCELLED = "cancelled"
"""A mark among the logs: the job shall not be requeued."""
IN_VAIN = "in-vain"
"""Among the logs: requeues in a row without a newer checkpoint than the last of them found, and that one's step. One
that is older, as after the newest was set aside as damaged, is no step forward; those that come after it are."""
GIVEN_UP = "given-up"
"""A mark among the logs: the job was started in vain as often as it may be."""
KILLED = range(129, 160)
"""128 + the signal that killed a rank: SIGKILL where the memory was short or its machine went, SIGABRT by NCCL's
watchdog, SIGUSR2 or SIGTERM where it was asked to stop before it could hear."""
AGAIN = f"{STOPPED_EARLY}|{LOST}|129|1[345][0-9]"

BEFORE = """\
job=$SLURM_JOB_ID  # of one element of an array it is the number of the whole array
[ -z "$SLURM_ARRAY_JOB_ID" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
logs="$1/{logs}" codes="$1/{logs}/codes-$job"
rm -rf "$codes"
mkdir -p "$codes"
trap : TERM  # the ranks hear it too: their end is waited for"""

AFTER = """\
code=$?
own=$(cat "$codes"/* 2>/dev/null)
for each in $own; do
    case $each in 0|{again}) ;; *) code=$each ;; esac
done
[ -n "$own" ] && [ -z "${{own//[0[:space:]]/}}" ] && [ -f "$1/{manifest}" ] && code=0  # a lost node was not needed
rm -rf "$codes"
case $code in
0)
    [ -f "$1/{manifest}" ] || {{ echo "error: every rank ended with 0, but $1/{manifest} is not there"; code=1; }} ;;
{again})
    if [ -e "$logs/{cancelled}" ]; then
        scancel "$job"
    else
        newest=$(ls "$1/{checkpoints}" 2>/dev/null | sed -nE 's/^step-0*([0-9]+)$/\\1/p' | sort -n | tail -n 1)
        newest=${{newest:--1}}
        read -r count before 2>/dev/null <"$logs/{in_vain}"
        [ "$newest" -le "${{before:-$newest}}" ] || count=0
        if [ "${{count:-0}}" -lt {requeues} ]; then
            echo "$((${{count:-0}} + 1)) $newest" >"$logs/{in_vain}"
            echo "the ranks ended with $code: start $((${{SLURM_RESTART_COUNT:-0}} + 2)) follows"
            scontrol requeue "$job"
        else
            echo "error: the ranks ended with $code, {requeues} requeues (requeues) brought no new checkpoint"
            touch "$logs/{given_up}"
        fi
    fi ;;
*)
    echo "error: a rank failed with exit code $code; see $logs/rank-*.log" ;;
esac
exit $code"""


@dataclass(frozen=True)
class Run:
    """What a job, or one element of an array, runs.

    Args:
        directory: the run directory, absolute.
        command: what follows `python -m`.
    """

    directory: Path
    command: list[str]

    @property
    def logs(self) -> Path:
        return self.directory / LOGS


@dataclass(frozen=True)
class Batch:
    """A job, or an array job of several runs.

    Args:
        resources: what each run is given.
        nodes: machines of each run.
        runs: one, or the elements of an array.
        name: what Slurm calls it.
        folder: where the scripts are kept, and the output of an array's scripts.
        after: Slurm's dependency, for instance afterok:12:13; empty for none.
        at_once: elements of an array that may run at the same time; 0 for no limit.
        min_nodes: nodes that a run under torchrun's agents goes on with; 0: srun starts the ranks, on all nodes.
    """

    resources: Resources
    nodes: int
    runs: Sequence[Run]
    name: str
    folder: Path
    after: str = ""
    at_once: int = 0
    min_nodes: int = 0

    def text(self) -> str:
        """The script."""
        return self._executor()._make_submission_file_text(self._srun(), "")

    def submit(self) -> str:
        """Returns the job's number.

        Raises:
            SlurmError: sbatch refused.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        from launchers.slurm.cluster import SlurmError

        self.folder.mkdir(parents=True, exist_ok=True)
        for run in self.runs:
            run.logs.mkdir(parents=True, exist_ok=True)
            for mark in (CANCELLED, GIVEN_UP, IN_VAIN):
                (run.logs / mark).unlink(missing_ok=True)
        try:
            return self._executor()._submit_command(self._srun()).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            raise SlurmError(f"sbatch refused: {error}") from error

    def _executor(self) -> "SlurmExecutor":
        from submitit import SlurmExecutor

        asked = self.resources
        output = f"{self.folder}/job-%a.log" if len(self.runs) > 1 else f"{self.runs[0].logs}/job.log"
        further = {
            "requeue": True,
            "chdir": str(Path.cwd()),
            "output": output,
            **({"kill-on-invalid-dep": "yes"} if self.after else {}),
            **({"nodes": f"{self.min_nodes}-{self.nodes}", "no-kill": True} if self.min_nodes else {}),
            **asked.options,
        }
        executor = SlurmExecutor(self.folder)
        executor.update_parameters(
            job_name=self.name,
            comment=str(self.runs[0].directory) if len(self.runs) == 1 else str(self.folder),
            nodes=self.nodes,
            gpus_per_node=asked.gpus_per_node or None,
            cpus_per_task=asked.cpus_per_task or None,
            mem=asked.memory or None,
            time=asked.time or None,
            partition=asked.partition or None,
            account=asked.account or None,
            qos=asked.qos or None,
            constraint=asked.constraint or None,
            exclude=asked.exclude or None,
            exclusive=asked.exclusive or self.min_nodes > 0 or None,
            dependency=self.after or None,
            signal_delay_s=asked.warning_s,
            stderr_to_stdout=True,
            wckey=None,
            array_parallelism=self.at_once or len(self.runs),
            additional_parameters=further,
            setup=self._before(),
            teardown=self._after(),
            use_srun=False,
        )
        if not self.min_nodes:  # else Slurm would count on the tasks of the fewest nodes, and give no more
            executor.update_parameters(ntasks_per_node=asked.ranks_per_node)
        if len(self.runs) > 1:
            executor.parameters["map_count"] = len(self.runs)
        return executor

    def _before(self) -> list[str]:
        variables = {"PYTHONUNBUFFERED": "1", **self.resources.environment}
        if self.min_nodes:  # else the ranks go on using the store of the first machine when that one is lost
            variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | variables
        lines = [f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
        lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
        lines += self.resources.setup
        called = [f"set -- {shlex.join([str(run.directory), *run.command])}" for run in self.runs]
        if len(called) == 1:
            lines += called
        else:
            elements = [f"{number}) {line} ;;" for number, line in enumerate(called)]
            lines += ["case $SLURM_ARRAY_TASK_ID in", *elements, "esac"]
        return [*lines, *BEFORE.format(logs=LOGS).splitlines()]

    def _after(self) -> list[str]:
        names = {"manifest": MANIFEST, "checkpoints": CHECKPOINTS}
        marks = {"cancelled": CANCELLED, "in_vain": IN_VAIN, "given_up": GIVEN_UP}
        return AFTER.format(again=AGAIN, requeues=self.resources.requeues, **names, **marks).splitlines()

    def _srun(self) -> str:
        """The ranks."""
        asked = self.resources
        options = ["--open-mode=append", "--kill-on-bad-exit=0"]
        if self.min_nodes:
            options += ["--nodes=$SLURM_JOB_NUM_NODES", "--ntasks-per-node=1", "--no-kill", "--wait=0"]
        else:
            options.append(f"--wait={asked.grace_s}")
        if asked.cpus_per_task:
            options.append(f"--cpus-per-task={asked.cpus_per_task}")  # since Slurm 22.05 a step does not inherit it
        inside: list[str] = []
        if asked.container:
            seen = [str(ROOT), str(Path.cwd()), "$1", *asked.mounts]
            mounts = ",".join(path if ":" in path else f"{path}:{path}" for path in seen)
            if asked.runtime == "pyxis":
                options += [f"--container-image={asked.container}", f"--container-mounts={mounts}"]
                options.append(f"--container-workdir={Path.cwd()}")
            else:
                inside = ["apptainer", "exec", *(["--nv"] if asked.gpus_per_node else [])]
                inside += [f"--pwd={Path.cwd()}", f"--bind={mounts}", asked.container]
        python = asked.python or ("python3" if asked.container else sys.executable)
        words = [
            "srun",
            "--output=$logs/rank-%t.log",
            *options,
            *inside,
            python,
            "-m",
            "launchers.slurm.rank",
            "$codes",
        ]
        return " ".join([*map(_expanded, [*words, *self._agent()]), '"${@:2}"'])

    def _agent(self) -> list[str]:
        """torchrun's, one on each node, where the number of nodes may change; they meet at the script's."""
        if not self.min_nodes:
            return []
        sizes = [f"--nnodes={self.min_nodes}:{self.nodes}", f"--nproc-per-node={self.resources.ranks_per_node}"]
        where = "--rdzv-endpoint=$SLURMD_NODENAME:$((20000 + SLURM_JOB_ID % 10000))"
        restarts = f"--max-restarts={self.resources.requeues}"
        return ["launchers.torchrun", *sizes, restarts, "--rdzv-backend=c10d", "--rdzv-id=$job", where, "-m"]


def _expanded(word: str) -> str:
    """A word of which the shell expands what begins with a $."""
    if "$" not in word:
        return shlex.quote(word)
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`") + '"'
