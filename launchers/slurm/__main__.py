"""`python -m launchers.slurm submit | status | logs | cancel | resume`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from conf import entry
from conf.errors import LongrunError
from launchers.slurm import jobs, show
from launchers.slurm.resources import SlurmConfig

CANCEL_S = 600


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["submit"]:
        submit(arguments[1:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m launchers.slurm", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("submit", help="submit a run: submit nodes=2 time=24:00:00 -- train experiment=...")
    status = verbs.add_parser("status", help="jobs, why they wait, how far they are")
    status.add_argument("runs", nargs="*", help="run directories or job numbers; all live jobs without")
    logs = verbs.add_parser("logs", help="what a rank printed, over all starts")
    logs.add_argument("run", help="run directory or job number")
    logs.add_argument("rank", nargs="?", default="0", help="a rank, or `job` for the job's script (default: 0)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    cancel = verbs.add_parser("cancel", help="let a run write a checkpoint, then end its job")
    cancel.add_argument("run", help="run directory or job number")
    cancel.add_argument("--now", action="store_true", help="do not wait for the checkpoint")
    cancel.add_argument(
        "--wait", type=float, default=CANCEL_S, help=f"seconds for the checkpoint (default: {CANCEL_S})"
    )
    resume = verbs.add_parser("resume", help="submit a run again, to go on from its newest checkpoint")
    resume.add_argument("run", help="run directory or job number")
    resume.add_argument("settings", nargs="*", help="settings that change, as in time=48:00:00")
    given = parser.parse_args(arguments)
    try:
        return VERBS[given.verb](given)
    except LongrunError as error:
        return entry.tell(error)
    except KeyboardInterrupt:
        return 130


def submit(arguments: list[str]) -> None:
    """What stands before -- are settings of `SlurmConfig`, what stands after is run."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[cut + 1 :]

    def run(config: SlurmConfig, resolved: dict[str, Any]) -> int:
        print(jobs.submit(config, resolved, command))
        return 0

    sys.argv[1:] = arguments[:cut]
    entry.run("slurm", SlurmConfig, run)


def status(given: argparse.Namespace) -> int:
    runs = [jobs.run_of(run) for run in given.runs]
    show.table(runs)
    return 0


def logs(given: argparse.Namespace) -> int:
    for line in show.lines(jobs.run_of(given.run), given.rank, given.follow):
        print(line, end="", flush=True)
    return 0


def cancel(given: argparse.Namespace) -> int:
    for said in jobs.cancel(jobs.run_of(given.run), given.wait, given.now):
        print(said, flush=True)
    return 0


def resume(given: argparse.Namespace) -> int:
    print(jobs.resume(Path(jobs.run_of(given.run)), given.settings))
    return 0


VERBS = {"status": status, "logs": logs, "cancel": cancel, "resume": resume}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
