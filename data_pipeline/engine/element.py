"""`python -m data_pipeline.engine.element JOB`: an element of a Slurm array works on its share of the pieces."""

import os
import sys
from pathlib import Path

import dill
from loguru import logger

from data_pipeline.executors.base import attempt
from data_pipeline.executors.slurm import ERRORS


def main(job_file: str) -> int:
    logger.remove()
    file = Path(job_file)
    job, shares = dill.loads(file.read_bytes())
    for piece in shares[int(os.environ["SLURM_ARRAY_TASK_ID"])]:
        if error := attempt(job, piece):
            print(error, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
            (file.parent / ERRORS / str(piece)).write_bytes(dill.dumps(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
