"""`python -m data_pipeline.engine.element JOB`: an element of a Slurm array works on its share of the pieces."""

import os
import sys
from pathlib import Path

from loguru import logger

from conf.errors import LongrunError
from data_pipeline.executors import sealed
from data_pipeline.executors.base import attempt
from data_pipeline.executors.slurm import ERRORS


def main(job_file: str) -> int:
    logger.remove()
    file = Path(job_file)
    try:
        key = sealed.given_key()
        job, shares = sealed.read(file, key)
    except LongrunError as refused:
        print(f"error: {refused}", file=sys.stderr)
        return refused.exit_code
    for piece in shares[int(os.environ["SLURM_ARRAY_TASK_ID"])]:
        if error := attempt(job, piece):
            print(error, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
            sealed.write(file.parent / ERRORS / str(piece), error, key)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
