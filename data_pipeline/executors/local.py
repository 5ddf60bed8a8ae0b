"""Pieces in processes of this machine."""

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from conf.registry import register
from data_pipeline.executors.base import Executor, Job, attempt, death

MODULES = ("readers.reading", "engine.chain", "engine.splitting", "engine.tokenising", "config")
"""Imported once, by the process that workers are forked from."""


@register("executor", "local")
@dataclass(frozen=True)
class Local(Executor):
    """Processes of this machine, one per core or as many as `workers` says.

    datatrove's own executor would wait for ever for a process that was killed, and leave its manager and its workers
    behind when it is killed itself; none of these outlives the process that started it.
    """

    def at_once(self, workers: int) -> int:
        return workers or len(os.sched_getaffinity(0))

    def run(self, job: Job, pieces: Sequence[int], workers: int) -> None:
        if workers == 1 or len(pieces) == 1:
            for piece in pieces:
                if error := attempt(job, piece):
                    raise error
            return
        from multiprocess import get_context
        from multiprocess.connection import wait

        context = get_context("forkserver")
        context.set_forkserver_preload([f"data_pipeline.{name}" for name in MODULES])
        left, busy, failed = list(pieces)[::-1], {}, None
        processes = []
        try:
            for _ in range(min(workers, len(left))):
                ours, its = context.Pipe()
                process = context.Process(target=_serve, args=(its, job), daemon=True)
                process.start()
                its.close()  # so that ours ends when the process does
                processes.append(process)
                busy[ours] = process, left.pop()
                ours.send(busy[ours][1])
            while busy:
                for pipe in wait(list(busy)):
                    process, piece = busy.pop(pipe)
                    try:
                        error = pipe.recv()
                    except EOFError:
                        process.join()
                        error = death(job, piece, process.exitcode)
                    failed = failed or error
                    if left and failed is None:
                        busy[pipe] = process, left.pop()
                        pipe.send(busy[pipe][1])
            if failed is not None:
                raise failed
        finally:
            for process in processes:
                process.kill()  # idle, or of no use any more
                process.join()


LOCAL = Local()


def _serve(pipe: Any, job: Job) -> None:
    """In a worker: work on the pieces that come, as long as the process lives that hands them out."""
    from multiprocess import parent_process
    from multiprocess.connection import wait

    def watch() -> None:
        wait([parent_process().sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    with suppress(EOFError):  # there are fewer pieces left than processes
        while True:
            pipe.send(attempt(job, pipe.recv()))
