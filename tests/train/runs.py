"""Whole runs as processes that a test can signal or kill: forked from the warm server of tools/ranks.py."""

import contextlib
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tools.ranks import PRELOAD

SETTINGS = (
    "model=smoke",
    "data.sequence_length=32",
    "stage.global_batch=8",
    "stage.validation_batches=2",
    "stage.precision=fp32",
    "stage.deterministic=true",
    "logger=jsonl",
    "preflight=off",
)
"""A run of a second or two; later settings win."""


@dataclass
class Running:
    """The ranks of a run under way."""

    processes: list[ForkServerProcess]
    logs: list[Path]
    store: Any

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Exit codes, negative for signals."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"still running after {timeout_s} s:\n{self.output()}"
        return [process.exitcode for process in self.processes if process.exitcode is not None]

    def signal(self, number: int, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)


def begin(
    corpus: Path | None,
    run_dir: Path,
    *settings: str,
    ranks: int = 1,
    stage: str = "pretrain",
    logs: Path | None = None,
    env: dict[str, str] | None = None,
    last: tuple[str, ...] = (),
) -> Running:
    """Start `python -m train` as so many ranks; what they print goes to files in `logs`, or beside run_dir. `env` are
    further environment variables, `last` further settings of the last rank only; without a corpus, `settings` say what
    is read."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    data = [f"data.path={corpus}"] if corpus else []
    arguments = [f"stage={stage}", *data, f"run_dir={run_dir}", *SETTINGS, *settings]
    processes, files = [], []
    for rank in range(ranks):
        variables = environment(rank, ranks, store.port) | (env or {})
        log = (logs or run_dir.parent) / f"{run_dir.name}.{time.monotonic_ns()}.{rank}.log"
        own = [*arguments, *last] if rank == ranks - 1 else arguments
        process = context.Process(target=_rank, args=(own, variables, sys.path, str(log)))
        process.start()
        processes.append(process)
        files.append(log)
    return Running(processes, files, store)


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def complete(corpus: Path | None, run_dir: Path, *settings: str, **how: Any) -> str:
    """A run that must end well, as for `begin`; returns what rank 0 printed."""
    running = begin(corpus, run_dir, *settings, **how)
    ranks = len(running.processes)
    codes = running.wait()
    assert codes == [0] * ranks, "\n".join(running.output(rank) for rank in range(ranks))
    return running.output()


def until(condition: Any, running: Running, timeout_s: float = 60) -> None:
    """Wait for something to happen while the run is alive."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert running.alive, f"the run ended first:\n{running.output()}"
        assert time.monotonic() < deadline, f"not seen in {timeout_s} s:\n{running.output()}"
        time.sleep(0.005)


def _rank(arguments: list[str], variables: dict[str, str], path: list[str], log: str) -> None:
    os.environ.update(variables)
    sys.path[:] = path
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import torch

    from conf import entry
    from train.__main__ import main
    from train.config import RunConfig

    torch.set_num_threads(1)
    sys.argv = ["train", *arguments]
    code: Any = 0
    try:
        entry.run("train", RunConfig, main)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  whatever it is, the test shall read it
        traceback.print_exc()
        code = 70
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
    os._exit(code or 0)
