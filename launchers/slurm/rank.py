"""`python -m launchers.slurm.rank CODES train ...`: one rank of a job, as srun starts it.

srun answers with the highest exit code of its tasks. Where one rank failed with 1 and the others, which it left
alone, ended with 76, the job's script must know of the 1: each rank leaves its own code under its number.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def main(codes: Path, command: list[str]) -> int:
    """Run `python -m <command>`; returns its exit code, 128 + n where signal n killed it."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # Slurm signals every process of a task: the command hears it too
    child = subprocess.Popen([sys.executable, "-m", *command])
    code = child.wait()
    code = code if code >= 0 else 128 - code
    (codes / os.environ["SLURM_PROCID"]).write_text(f"{code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
