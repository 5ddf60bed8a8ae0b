"""Work handed to other processes through files: what is read is what was written by one that holds the same key.

A job is Python objects, and reading those runs what they say. The directory of a step is writable by others on some
clusters, so its files are believed only with their code (HMAC, RFC 2104) under a key that is made for each submission
and is nowhere on disk: Slurm hands it on in the environment of the job.
"""

import hmac
import os
from pathlib import Path
from typing import Any

from conf.errors import LongrunError

VARIABLE = "LONGRUN_JOB_KEY"
DIGEST, DIGEST_BYTES = "sha256", 32


class SealError(LongrunError):
    """A file is not what was written, or the key of its writer is not here."""


def write(file: Path, value: Any, key: str) -> None:
    import dill

    content = dill.dumps(value)
    file.write_bytes(hmac.digest(key.encode(), content, DIGEST) + content)


def read(file: Path, key: str) -> Any:
    """What `write` wrote there with this key; nothing of it is interpreted before that is known.

    Raises:
        SealError: something else is there.
    """
    import dill

    sealed = file.read_bytes()
    digest, content = sealed[:DIGEST_BYTES], sealed[DIGEST_BYTES:]
    if not hmac.compare_digest(digest, hmac.digest(key.encode(), content, DIGEST)):
        raise SealError(
            f"{file} is not what this run wrote: it was damaged or replaced, and is not read. See who else may write "
            "in that directory, then run the same command again."
        )
    return dill.loads(content)  # noqa: S301  of our own making, as its code shows


def given_key() -> str:
    """Raises SealError where the environment lacks it."""
    if key := os.environ.get(VARIABLE):
        return key
    raise SealError(
        f"{VARIABLE} is not in this job's environment: let sbatch hand the environment on (no --export=NONE, no "
        "SBATCH_EXPORT); it is what the job's file is believed by."
    )
