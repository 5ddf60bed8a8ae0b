"""`python -m launchers.lifecycle lifecycle=demo`: a model's life, stage by stage, as a graph of artifacts.

A stage is done when its process exited with 0 *and* its manifest can be read. The stage itself decides whether what it
finds is what it would make; the lifecycle only avoids the start of a process where it can prove that nothing changed:
same command line, same inputs, same code, same files, those outside that its settings name included.
"""

import hashlib
import json
import os
import shlex
import shutil
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launchers
from conf import entry, secrets
from conf.checkpoints import CHECKPOINTS
from conf.errors import LongrunError, OccupiedError
from conf.registry import discover
from data_pipeline.artifact import MANIFEST, Artifact, ArtifactError, fingerprint, locked, write_atomically
from launchers import preflight
from launchers.base import DONE, LOST, STOPPED_EARLY, Ahead, Ended, Queue, Running
from launchers.display import Display, Row, duration, headline
from launchers.graph import LifecycleConfig
from launchers.interrupts import KILLED, heeded, pass_on
from launchers.restarts import Restarts

discover(launchers)

ROOMS = ("conf", "data_pipeline", "parallel", "train", "tools")
BOOK = "lifecycle.json"
POLL_S = 0.05
LAST_LINES = 15


class StagesError(LongrunError):
    """The configuration of one or more stages is wrong."""


@dataclass
class Attempt:
    """One stage being run, over its restarts.

    Args:
        log: where every line goes.
        before: the artifact that was there at the start, and when its manifest was written.
        cut: the directory held an unfinished run.
        restarts: those it had, and whether it may have another.
    """

    log: Path
    before: tuple[str, int] | None
    cut: bool
    restarts: Restarts
    running: Running = field(init=False)
    started_s: float = field(default_factory=time.monotonic)
    moved_aside: bool = False
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))


class Life:
    """Runs a lifecycle in a directory that this process holds."""

    def __init__(self, config: LifecycleConfig):
        self.config = config
        self.root = Path(config.root)
        self.order = config.order()
        self.display = Display(self.order)
        self.redacted = secrets.redactor()
        self.code = code_fingerprint()
        self.book = self._read_book()
        self.rows: dict[str, Row] = {}
        self.planned: dict[str, Row] = {}
        self.running: dict[str, Attempt] = {}
        self.stop_requests = 0

    # What is done.

    def proven(self, name: str) -> Artifact | None:
        """The stage's artifact, where a start could not change it."""
        try:
            artifact = Artifact.read(self.root / name)
        except ArtifactError:
            return None
        record = self.book["done"].get(name)
        same = record == self._record(name, artifact) and not artifact.damage(contents=False)
        return artifact if same else None

    def _record(self, name: str, artifact: Artifact) -> dict[str, Any]:
        """What must not have changed for the stage to be passed over."""
        spec = self.config.stages[name]
        inputs: dict[str, str | None] = {}
        for other in spec.inputs():
            try:
                inputs[other] = Artifact.read(self.root / other).id
            except ArtifactError:
                inputs[other] = None
        call = spec.call(self.root, name)
        return {
            "id": artifact.id,
            "call": call,
            "processes": spec.processes,
            "inputs": inputs,
            "outside": {text: listing(Path(text)) for text in spec.texts() if self._is_outside(text)},
            "code": self.code,
        }

    def _is_outside(self, text: str) -> bool:
        """Whether it names a file or directory that no stage makes."""
        return os.path.exists(text) and not Path(text).resolve().is_relative_to(self.root.resolve())

    def _read_book(self) -> dict[str, dict[str, Any]]:
        """What is known of the stages: how they are called, the records of those done and the wall time they took
        with the start of their processes, why others failed."""
        try:
            earlier = json.loads((self.root / BOOK).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            earlier = {}  # nothing is proven; every stage looks for itself
        stages = {}
        for name in self.order:
            spec = self.config.stages[name]
            command = shlex.join(["python", "-m", *spec.call(self.root, name)])
            stages[name] = {"command": command, "processes": spec.processes, "inputs": spec.inputs()}
        return {
            "stages": stages,
            "done": earlier.get("done", {}),
            "seconds": earlier.get("seconds", {}),
            "failed": {},
        }

    def _write_book(self) -> None:
        write_atomically(self.root / BOOK, json.dumps(self.book, indent=1) + "\n")

    # The run.

    def plan(self) -> list[Row]:
        """Every stage: proven done, or to be started.

        Raises:
            StagesError: a configuration that would be refused; names every stage and problem.
        """
        rows: dict[str, Row] = {}
        for name in self.order:
            behind = [other for other in self.config.stages[name].inputs() if rows[other].state == "to run"]
            artifact = None if behind else self.proven(name)
            if artifact:
                rows[name] = self._row(name, "skipped", artifact)
            else:
                unfinished = (self.root / name).is_dir() and not (self.root / name / MANIFEST).exists()
                rows[name] = Row(name, "to run", note="goes on where it was cut" if unfinished else "")
        self._preflight([name for name in self.order if rows[name].state == "to run"])
        return list(rows.values())

    def _preflight(self, names: list[str]) -> None:
        calls = []
        for name in names:
            spec = self.config.stages[name]
            missing = [str(self.root / other) for other in spec.inputs() if not (self.root / other / MANIFEST).exists()]
            calls.append(preflight.Check(name, spec.call(self.root, name), spec.processes, missing))
        if calls and (wrong := preflight.check(calls)):
            told = "\n".join(f"stage {name}:\n  " + text.replace("\n", "\n  ") for name, text in wrong.items())
            raise StagesError(f"nothing was started.\n{told}\nChange it under `stages.<stage>` of the lifecycle.")

    def run(self) -> int:
        """Run what is to be run; returns the exit code."""
        began = time.monotonic()
        self.planned = {row.stage: row for row in self.plan()}
        queued = self._queue()
        for name, called in queued.items():
            self.planned[name].note = called
        self.display.table(f"{self.config.name} in {self.root}", self.planned.values())
        if queued and self.config.launcher.detach:
            self._write_book()
            self.display.say("The jobs go on by themselves; the same command joins them, or shows what became of them.")
            return DONE
        with heeded(self._interrupted):
            while len(self.rows) < len(self.order):
                self._start_what_can_be()
                for name in list(self.running):
                    if ended := self.running[name].running.poll():
                        self._ended(name, ended)
                if self.running:
                    time.sleep(POLL_S)
        took = duration(time.monotonic() - began)
        self.display.table(f"{self.config.name} after {took}", [self.rows[name] for name in self.order])
        return self._conclude()

    def _queue(self) -> dict[str, str]:
        """Where the launcher has a queue, put every stage that is to run into it at once: the life then goes on also
        when this process ends. Returns what the queue calls each."""
        if not isinstance(self.config.launcher, Queue):
            return {}
        names = [name for name, row in self.planned.items() if row.state == "to run"]
        ahead = []
        for name in names:
            spec = self.config.stages[name]
            after = [other for other in spec.inputs() if other in names]
            call = spec.call(self.root, name)
            ahead.append(Ahead(name, (self.root / name).resolve(), call, spec.processes, after, spec.always))
        return self.config.launcher.ahead(ahead)

    def _start_what_can_be(self) -> None:
        for name in self.order:
            spec = self.config.stages[name]
            waits = [other for other in spec.inputs() if other not in self.rows]
            if name in self.rows or name in self.running or waits:
                continue
            failed = any(row.state in ("failed", "not started") for row in self.rows.values())
            if self.stop_requests or (failed and not spec.always):
                if not self.running:
                    self.rows[name] = Row(name, "not started")
            elif artifact := self.proven(name):
                self.rows[name] = self._row(name, "skipped", artifact)
            elif len(self.running) < self.config.concurrent:
                self._start(name)

    def _start(self, name: str) -> None:
        directory, log = self.root / name, self.root / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        before: tuple[str, int] | None = None
        try:
            artifact = Artifact.read(directory)
            before = (artifact.id, (directory / MANIFEST).stat().st_mtime_ns)
            if bad := artifact.damage(contents=False):
                self._move_aside(name, f"is damaged ({', '.join(bad)})")
                before = None
        except ArtifactError:
            pass  # not made yet, or cut
        self.book["done"].pop(name, None)
        self._write_book()
        cut = before is None and (directory / CHECKPOINTS).is_dir()
        self.running[name] = Attempt(log, before, cut, Restarts(directory / CHECKPOINTS, self.config.restarts))
        self._launch(name, self.running[name])

    def _launch(self, name: str, attempt: Attempt) -> None:
        spec = self.config.stages[name]
        call = spec.call(self.root, name)
        command = shlex.join(["python", "-m", *call])
        on = "" if spec.processes == 1 else f" on {spec.processes} processes"
        self.display.say(f"{name}{on}: {command}", style="bold cyan")
        with open(attempt.log, "a") as log:
            log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')}{on} {command}\n")

        def output(rank: int, line: str) -> None:
            line = self.redacted(line)
            attempt.last_lines.append(line)
            self.display.line(name, rank, line)
            with self.display.lock, open(attempt.log, "a") as log:
                log.write(line + "\n" if rank == 0 else f"[{rank}] {line}\n")

        attempt.running = self.config.launcher.start(call, spec.processes, output)

    def _ended(self, name: str, ended: Ended) -> None:
        attempt = self.running[name]
        if ended.code == OccupiedError.exit_code and not attempt.moved_aside and not self.stop_requests:
            attempt.moved_aside = True
            self._move_aside(name, "was made by another configuration or other inputs")
            self._launch(name, attempt)
        elif ended.code in (STOPPED_EARLY, LOST) and not self.stop_requests and attempt.restarts.another():
            why = "stopped early with a checkpoint" if ended.code == STOPPED_EARLY else f"was lost: {ended.reason}"
            self.display.say(f"{name} {why}; start {attempt.restarts.count + 1}", style="yellow")
            self._launch(name, attempt)
        else:
            del self.running[name]
            self.rows[name] = row = self._judge(name, attempt, ended)
            if row.state == "failed":
                self.book["failed"][name] = row.note
            if row.state != "skipped":
                row.seconds = time.monotonic() - attempt.started_s
                self.book["seconds"][name] = row.seconds + (self.book["seconds"].get(name, 0) if attempt.cut else 0)
            self._write_book()

    def _judge(self, name: str, attempt: Attempt, ended: Ended) -> Row:
        """What the stage came to, once it will not be started again."""
        if ended.code == STOPPED_EARLY and self.stop_requests:
            return Row(name, "cut", note="stopped on request with a checkpoint")
        if self.stop_requests and ended.code != DONE:
            return Row(name, "cut", note=f"stopped on request; {ended.reason}")
        if ended.code == STOPPED_EARLY:
            return Row(name, "failed", note=f"stopped early {attempt.restarts.starts}; see restarts")
        if ended.code != DONE:
            self._show_last_lines(name, attempt)
            lost = f" ({attempt.restarts.starts}; see restarts)" if ended.code == LOST else ""
            return Row(name, "failed", note=ended.reason + lost)
        try:
            artifact = Artifact.read(self.root / name)
        except ArtifactError as error:
            self._show_last_lines(name, attempt)
            return Row(name, "failed", note=f"it exited with 0, but {error}")
        self.book["done"][name] = self._record(name, artifact)
        after = (artifact.id, (artifact.path / MANIFEST).stat().st_mtime_ns)
        state = "skipped" if after == attempt.before else "resumed" if attempt.cut or attempt.restarts.count else "done"
        return self._row(name, state, artifact)

    def _row(self, name: str, state: str, artifact: Artifact) -> Row:
        return Row(name, state, self.book["seconds"].get(name, artifact.duration_s), headline(artifact))

    def _show_last_lines(self, name: str, attempt: Attempt) -> None:
        self.display.say(f"{name} failed. The last lines of {attempt.log}:", style="bold red")
        for line in attempt.last_lines:
            self.display.say(f"    {line}", style="")

    def _move_aside(self, name: str, why: str) -> None:
        """Keep what is in the stage's way as `<stage>.stale-<id>`, in place of what was kept before."""
        directory = self.root / name
        try:
            label = Artifact.read(directory).id
        except ArtifactError:
            label = "unfinished"
        for earlier in self.root.glob(f"{name}.stale-*"):
            shutil.rmtree(earlier)
        aside = directory.with_name(f"{name}.stale-{label}")
        directory.rename(aside)
        self.display.say(f"{directory} {why}: it is kept as {aside} and made anew", style="yellow")

    def _conclude(self) -> int:
        rows = [self.rows[name] for name in self.order]
        if failed := [row for row in rows if row.state == "failed"]:
            for row in failed:
                self.display.say(f"error: stage {row.stage} failed: {row.note}", style="bold red")
                self.display.say(
                    f"The log is {self.root / 'logs' / row.stage}.log; mend it and start again: it goes on there."
                )
            return 1
        if any(row.state in ("cut", "not started") for row in rows):
            self.display.say("Stopped on request. The same command goes on from here.", style="yellow")
            return STOPPED_EARLY if self.stop_requests < 2 else KILLED
        return DONE

    def _interrupted(self) -> None:
        """The stages are asked to write a checkpoint; the second time they are killed."""
        self.stop_requests += 1
        running = [attempt.running for attempt in self.running.values()]
        pass_on(self.config.launcher, running, now=self.stop_requests > 1)


def listing(path: Path) -> str:
    """Changes with the names, sizes or times of the files there."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    return fingerprint([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def code_fingerprint() -> str:
    """Changes with every source and configuration file that a stage could read."""
    here = Path(__file__).parent.parent
    sources = sorted(f for room in ROOMS for kind in ("*.py", "*.yaml", "*.jinja") for f in (here / room).rglob(kind))
    return fingerprint([[str(f.relative_to(here)), hashlib.sha256(f.read_bytes()).hexdigest()] for f in sources])


def main(config: LifecycleConfig, resolved: dict[str, Any]) -> int:
    if config.dry_run:
        life = Life(config)
        life.display.table(f"{config.name} in {config.root}", life.plan())
        for name in life.order:
            life.display.line(name, 0, shlex.join(["python", "-m", *config.stages[name].call(life.root, name)]))
        return DONE
    with locked(config.root):
        return Life(config).run()


if __name__ == "__main__":
    entry.run("lifecycle", LifecycleConfig, main)
