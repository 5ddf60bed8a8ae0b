"""Where the pieces of a step are worked on. The bytes that come out do not depend on it."""

import contextlib
import errno
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from conf.errors import LongrunError, Problem

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GO_ON = "Then run the same command again: it goes on with the pieces that are lacking and ends with the same bytes."


class PieceError(LongrunError):
    """The process that worked on a piece died, or a job ended without its result."""


class DiskFullError(LongrunError):
    """There is no room for what is written."""


class Job(Protocol):
    """A step that is cut into pieces."""

    directory: Path
    """Its logs: what an earlier, cut run completed is marked there."""

    def do(self, piece: int) -> None:
        """Work on one piece, unless it is complete."""

    def complete(self, piece: int) -> bool:
        """Whether its result is there."""


class Executor:
    """Subclasses are frozen dataclasses registered with `@register("executor", name)`."""

    def problems(self) -> list[Problem]:
        """Everything wrong with the settings."""
        return []

    def at_once(self, workers: int) -> int:
        """How many pieces are worked on at the same time where `workers` are asked for; 0 leaves it to the executor."""
        raise NotImplementedError

    def run(self, job: Job, pieces: Sequence[int], workers: int) -> None:
        """Work on these pieces. After one has failed, no further one is begun, and those under way are completed.

        Raises:
            PieceError: a process died or a job ended without a result; names the piece.
            DiskFullError: a piece could not be written.
        """
        raise NotImplementedError


def attempt(job: Job, piece: int) -> Exception | None:
    """Work on a piece; what went wrong is returned, in a form that can be sent to another process."""
    try:
        with roomy(f"{job.directory}, piece {piece}"):
            job.do(piece)
    except Exception as error:  # noqa: BLE001  # it is raised again where the step was started
        if not isinstance(error, LongrunError):
            error.add_note(f"In piece {piece} of {job.directory}:\n{traceback.format_exc()}")
        return error
    return None


@contextlib.contextmanager
def roomy(what: str) -> Iterator[None]:
    """Tell a full disk from other errors.

    Raises:
        DiskFullError: something could not be written for lack of room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFullError(
            f"{what}: no room is left ({os.strerror(error.errno)}). Free some, raise the quota or limit, or give a "
            f"run_dir on another disk. {GO_ON}"
        ) from error


def death(job: Job, piece: int, code: int) -> PieceError:
    """The error for a process that ended in the middle of a piece.

    Args:
        job: that it worked for.
        piece: that it worked on.
        code: its exit code; negative for a signal.
    """
    cause = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    hint = (
        " Nobody stopped it? Then the kernel did, for lack of memory (see dmesg): give fewer workers, or cut the work "
        "into more corpus.pieces, which begins the steps anew."
        if code == -signal.SIGKILL
        else ""
    )
    return PieceError(f"{job.directory}: the process that worked on piece {piece} ended by {cause}.{hint} {GO_ON}")
