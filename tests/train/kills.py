"""Runs that are killed with SIGKILL inside what they do to their directory.

A rank counts its writes, syncs, renames, removals, reads and host copies, and at the one that was drawn it kills
itself: before it, after it, or, in a write, with half of the bytes written. Or it has itself killed a random time after
that, wherever it is then. Ranks are forked from the warm server of tools/ranks.py with a configuration that was
composed once, so that a start is the run's own work.
"""

import builtins
import contextlib
import io
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from conf.errors import LongrunError
from tests.ranks import run_ranks
from tests.train.runs import SETTINGS, environment
from tools.ranks import PRELOAD
from train.checkpoint.committed import damage, path_of, steps

TARGETS = (
    ("write", "/rank-", 400),
    ("sync", "/rank-", 4),
    *((kind, file, 4) for file in ("index.json", "trainer.json", "checksums.json") for kind in ("write", "rename")),
    ("sync", "/checkpoints", 30),
    ("rename", "/checkpoints/step-", 4),
    ("rename", ".old", 3),
    ("remove", ".old", 20),
    ("mkdir", "/checkpoints", 5),
    ("read", "/checkpoints", 30),
    ("copy", "", 400),
    ("copy", "", 400),
    ("write", "/metrics.jsonl", 12),
    ("write", "/model/", 8),
    ("sync", "/model/", 1),
    ("rename", "/model/", 1),
    ("sync", "", 40),
    ("rename", "", 20),
    ("rename", "/manifest.json", 1),
    ("moment", "", 1200),
    ("moment", "", 1200),
)
"""What a kill strikes: the kind, what the path contains, and how many there are from a start to a few saves later. A
moment comes after any of them."""


@dataclass(frozen=True)
class Kill:
    """One death.

    Args:
        kind: see TARGETS.
        place: only where the path contains it; copies and moments have no path.
        at: the how-many-th of its kind.
        after: once it is done, not before; in a write: before, or when half of it is done.
        delay_s: of a moment.
    """

    kind: str
    place: str
    at: int
    after: bool
    delay_s: float

    @classmethod
    def drawn(cls, dice: random.Random) -> "Kill":
        kind, place, most = dice.choice(TARGETS)
        return cls(kind, place, dice.randint(1, most), dice.random() < 0.5, dice.random() * 0.02)


class Switch:
    """Patches this process so that it dies of a kill.

    Args:
        directory: of the run; what happens elsewhere does not count.
        tally: a file that is told what was struck.
    """

    def __init__(self, kill: Kill, directory: Path, tally: Path):
        self.kill, self.directory = kill, str(directory)
        self.counted = 0
        self.tally = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.executioner = self._executioner() if kill.kind == "moment" else -1

    def arm(self) -> None:
        import torch

        for name, kind in (("replace", "rename"), ("mkdir", "mkdir"), ("unlink", "remove"), ("rmdir", "remove")):
            setattr(os, name, self._around(kind, getattr(os, name), self._path))
        os.fsync = self._around("sync", os.fsync, lambda number: os.readlink(f"/proc/self/fd/{number}"))
        copy = torch.UntypedStorage.copy_
        torch.UntypedStorage.copy_ = self._around("copy", copy, lambda *_: "")  # type: ignore[method-assign]
        opened = builtins.open
        builtins.open = io.open = lambda file, *a, **k: self._watched(opened(file, *a, **k), file)  # type: ignore

    def _path(self, path: Any, *others: Any, dir_fd: int | None = None, **_: Any) -> str:
        beside = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
        return os.path.join(beside, *(str(part) for part in (path, *others)))

    def _around(self, kind: str, call: Callable[..., Any], where: Callable[..., str]) -> Callable[..., Any]:
        def struck(*args: Any, **keywords: Any) -> Any:
            what = where(*args, **{k: v for k, v in keywords.items() if kind != "copy"})
            due = self._due(kind, what)
            if due and not self.kill.after:
                self._strike(f"before {kind} {what}")
            result = call(*args, **keywords)
            if due:
                self._strike(f"after {kind} {what}")
            return result

        return struck

    def _watched(self, stream: Any, file: Any) -> Any:
        path = str(file)
        if isinstance(file, int) or not path.startswith(self.directory) or path == self.directory:
            return stream
        if stream.writable():
            stream.write = self._writing(stream, stream.write, path)
        elif hasattr(stream, "readinto"):
            stream.readinto = self._around("read", stream.readinto, lambda *_: path)
        return stream

    def _writing(self, stream: Any, write: Callable[[Any], int], path: str) -> Callable[[Any], int]:
        def struck(data: Any) -> int:
            if self._due("write", path):
                if self.kill.after:
                    write(data[: len(data) // 2])
                    stream.flush()
                self._strike(f"{'inside' if self.kill.after else 'before'} write {path}")
            return write(data)

        return struck

    def _due(self, kind: str, path: str) -> bool:
        """Whether this is the one; where a moment was drawn, its time runs from here."""
        moment = self.kill.kind == "moment"
        if (kind != "copy" and self.directory not in path) or (not moment and kind != self.kill.kind):
            return False
        if kind != "copy" and not moment and self.kill.place not in path:
            return False
        self.counted += 1
        if self.counted == self.kill.at and moment:
            os.write(self.executioner, b".")
        return self.counted == self.kill.at and not moment

    def _strike(self, what: str) -> None:
        os.write(self.tally, (what.replace(self.directory, "") + "\n").encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def _executioner(self) -> int:
        """A process that kills this one so long after it was told to: whatever any thread does then."""
        doomed = os.getpid()
        ear, mouth = os.pipe()
        if os.fork():
            os.close(ear)
            return mouth
        os.close(mouth)
        if os.read(ear, 1):
            time.sleep(self.kill.delay_s)
            os.write(self.tally, b"moment\n")
            os.kill(doomed, signal.SIGKILL)
        os._exit(0)


@dataclass
class Campaign:
    """Runs of one configuration, killed again and again.

    Args:
        run: the configuration and its resolved form, for so many ranks.
        directory: an empty one for the runs.
        uninterrupted: the same run, which nobody killed.
        same: raises where two finished run directories are not the same run.
        struck: what the kills came upon.
        finished: runs that came to their end and were compared.
    """

    run: tuple[Any, dict[str, Any]]
    ranks: int
    directory: Path
    uninterrupted: Path
    same: Callable[[Path, Path], None]

    def __post_init__(self) -> None:
        self.struck: Counter[str] = Counter()
        self.finished = 0

    def kill(self, times: int, seed: int) -> None:
        """Kill so many times, and bring the last run to its end."""
        dice = random.Random(seed)
        number = 0
        while sum(self.struck.values()) < times:
            self._attempt(number, Kill.drawn(dice), dice.randrange(self.ranks))
            number = self.finished
        while number == self.finished:
            self._attempt(number, None, 0)

    def _attempt(self, number: int, kill: Kill | None, victim: int) -> None:
        run_dir, tally = self.directory / f"run{number}", self.directory / "tally"
        tally.write_text("")
        before = steps(run_dir / "checkpoints")
        codes, said = start(self.run, run_dir, self.ranks, kill, victim, tally)
        if codes == [0] * self.ranks:
            self.same(run_dir, self.uninterrupted)
            self.finished += 1
            return
        assert codes[victim] == -signal.SIGKILL and kill is not None, f"{kill}: {codes}\n{said}"
        after = steps(run_dir / "checkpoints")
        assert max(after, default=0) >= max(before, default=0), f"{kill}: {before} became {after}\n{said}"
        for step in after:
            assert not damage(path_of(run_dir / "checkpoints", step)), f"{kill}: step {step}\n{said}"
        self.struck[label(tally.read_text())] += 1


def label(what: str) -> str:
    """The kind of a kill and what it came upon, for the count."""
    when, _, rest = what.strip().partition(" ")
    kind, _, path = rest.partition(" ")
    if not rest or kind == "copy":
        return f"{when} {kind}".strip()
    places = {".tmp": "of a save", ".old": "of retired steps", "step-": "of committed steps", "/model": "of the model"}
    place = next((name for part, name in places.items() if part in path), "of the run directory")
    return f"{when} {kind} {place}"


def start(
    run: tuple[Any, dict[str, Any]], run_dir: Path, ranks: int, kill: Kill | None, victim: int, tally: Path
) -> tuple[list[int], str]:
    """One attempt: exit codes of the ranks, and what they printed. When the victim dies, so do the others."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    config, resolved = run
    payload = pickle.dumps((replace(config, run_dir=str(run_dir)), {**resolved, "run_dir": str(run_dir)}))
    processes, logs = [], []
    for rank in range(ranks):
        logs.append(run_dir.parent / f"log.{rank}")
        drawn = kill if rank == victim else None
        variables = environment(rank, ranks, store.port)
        process = context.Process(target=_rank, args=(payload, variables, sys.path, str(logs[-1]), drawn, tally))
        process.start()
        processes.append(process)
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        ready = connection.wait(list(waiting), 120)
        assert ready, "still running after 120 s:\n" + "".join(log.read_text() for log in logs)
        for sentinel in ready:
            process = waiting.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            if process.exitcode:
                for other in waiting.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other.pid or 0, signal.SIGKILL)
    return [process.exitcode or 0 for process in processes], "".join(log.read_text() for log in logs)


def _rank(payload: bytes, variables: dict[str, str], path: list[str], log: str, kill: Kill | None, tally: Path) -> None:
    os.environ.update(variables)
    sys.path[:] = path
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import torch

    from train import throughput

    torch.set_num_threads(1)
    throughput.measured_flops = lambda *_: 1e9  # takes a second, and tells nothing here
    config, resolved = pickle.loads(payload)
    if kill is not None:
        Switch(kill, Path(config.run_dir), tally).arm()
    code: Any = 0
    try:
        code = config.stage.run(config, resolved)
    except SystemExit as end:
        code = end.code
    except LongrunError as error:
        print(error)
        code = error.exit_code
    except BaseException:  # noqa: BLE001  whatever it is, the test shall read it
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    os._exit(code or 0)


def composed(corpus: Path, *settings: str, ranks: int) -> tuple[Any, dict[str, Any]]:
    """The configuration of a run of so many ranks."""
    return pickle.loads(run_ranks(ranks, _composed, [f"data.path={corpus}", *SETTINGS, *settings])[0])


def _composed(overrides: list[str]) -> bytes:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from conf.entry import typed
    from train.config import RunConfig

    with initialize_config_module("conf", version_base="1.3"):
        node = compose("train", overrides=["stage=pretrain", *overrides])
    return pickle.dumps((typed(node, RunConfig), OmegaConf.to_container(node, resolve=True)))
