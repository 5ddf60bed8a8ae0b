"""Run a function on N processes of this machine: a warm server forks the ranks, so a launch costs tenths of a second.

The server (multiprocessing's forkserver) has imported torch but never computed anything: a process that ran a backward
pass or an OpenMP region must not be forked, and a test session has. Each rank finds the environment that torchrun
would give it, so the code under test starts its process group as it always does.
"""

import contextlib
import faulthandler
import importlib
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from typing import Any

from conf.errors import LongrunError

PRELOAD = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.optim",
    "hydra",
    "parallel.distributed",
    "parallel.engines.native",
    "train.config",
)
"""What the server imports once; a rank imports what is missing."""
FAILED = "failed"
ALARM = "Timeout ("
"""How faulthandler's report of a rank begins that took too long."""


class RanksError(LongrunError):
    """A rank raised, died or did not end in time; the message names it and carries its output."""


def run_ranks(
    n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120, env: dict[str, str] | None = None
) -> list[Any]:
    """Call `fn(*args)` on ranks 0..n-1 and return what each returned.

    The function starts the process group itself (`parallel.distributed.start()`), if it wants one.

    Args:
        n: number of processes.
        fn: a function that can be pickled: defined at the top of a module, not a lambda or a closure.
        args: arguments, which are pickled too.
        timeout_s: after so many seconds every rank prints its stack and is killed.
        env: further environment variables of the ranks.

    Raises:
        RanksError: names the rank that failed first and shows the end of its output; the others are killed.
    """
    [results] = stream_ranks(n, _single, fn, args, timeout_s=timeout_s, env=env)
    return results


def _single(fn: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[Any]:
    yield fn(*args)


def stream_ranks(
    n: int, fn: Callable[..., Iterator[Any]], *args: Any, timeout_s: float = 120, env: dict[str, str] | None = None
) -> Iterator[list[Any]]:
    """As `run_ranks` for a generator function: what each rank yields, as soon as all have yielded it.

    Args:
        n, fn, args, env: as in `run_ranks`.
        timeout_s: for each item.

    Raises:
        RanksError: as in `run_ranks`; it is the first item not yet given that failed.
    """
    store = _store()
    common = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours: no port to guess, none to collide
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **(env or {}),
    }
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *sorted({"pytest", "tools.parity"} & sys.modules.keys())])
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        processes, pipes = [], []
        for rank in range(n):
            receiver, sender = context.Pipe(duplex=False)
            variables = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = os.path.join(directory, str(rank))
            # A test module is imported by name in the rank, so it needs this process's search path.
            process = context.Process(target=_rank, args=(payload, variables, sys.path, log, timeout_s, sender))
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            yield from _collect(processes, pipes, directory, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _store() -> Any:
    """A key-value store on a port that the system chose, served by this process."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _collect(
    processes: list[ForkServerProcess], pipes: list[connection.Connection], directory: str, timeout_s: float
) -> Iterator[list[Any]]:
    while True:
        kinds, contents = zip(*_round(processes, pipes, directory, timeout_s), strict=True)
        if "end" in kinds:
            return
        yield list(contents)


def _round(
    processes: list[ForkServerProcess], pipes: list[connection.Connection], directory: str, timeout_s: float
) -> list[tuple[str, Any]]:
    """The next message of each rank."""
    messages: dict[int, tuple[str, Any]] = {}
    deadline = time.monotonic() + timeout_s + 10  # the ranks' own alarm comes first and shows where each stood
    while len(messages) < len(processes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in messages]
        ready = connection.wait(waiting, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            raise RanksError(f"ranks {sorted(set(range(len(pipes))) - set(messages))} did not end in {timeout_s} s.")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                kind, content = pickle.loads(pipes[rank].recv_bytes())  # noqa: S301  a pipe to our own child
            except EOFError:
                processes[rank].join(10)
                kind, content = FAILED, f"it died with exit code {processes[rank].exitcode}"
            if kind == FAILED:
                output = _output(directory, rank)
                if ALARM in output:
                    content = f"it did not end in {timeout_s:g} s"
                raise RanksError(f"rank {rank} of {len(processes)} failed: {content}\n{output[-4000:]}")
            messages[rank] = kind, content
    return [messages[rank] for rank in range(len(processes))]


def _output(directory: str, rank: int) -> str:
    """What a rank printed; nothing where it died before it could."""
    try:
        with open(os.path.join(directory, str(rank)), errors="replace") as log:
            return log.read()
    except FileNotFoundError:
        return ""


def _rank(
    payload: bytes,
    variables: dict[str, str],
    path: list[str],
    log: str,
    timeout_s: float,
    pipe: connection.Connection,
) -> None:
    """Body of one rank. Results travel as plain pickle: torch's own would share memory with a process that ends."""
    os.environ.update(variables)
    sys.path[:] = path
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()
    torch = importlib.import_module("torch")
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))  # the server read another environment
    try:
        # It imports the module of fn, which should not count against its time.
        fn, args = pickle.loads(payload)  # noqa: S301  an argument of our own parent
        items = fn(*args)
        kind = "item"
        while kind == "item":
            faulthandler.dump_traceback_later(timeout_s, exit=True)
            try:
                answer = next(items)
            except StopIteration:
                kind, answer = "end", None
            _send(pipe, kind, answer)
    except BaseException as error:  # noqa: BLE001  it is reported by the parent, whatever it is
        _send(pipe, FAILED, f"{error!r}\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of a broken process group must not keep the rank alive


def _send(pipe: connection.Connection, kind: str, content: Any) -> None:
    message = pickle.dumps((kind, content))
    with contextlib.suppress(BrokenPipeError):  # the parent gave up
        pipe.send_bytes(message)
