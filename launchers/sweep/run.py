"""A sweep under way: proposes trials, starts them, follows what they report, ends those that fall behind.

A trial is a run directory like any other. What is known of it is in the journal before anything depends on it, so that
a sweep that was killed goes on: the same trials, each from its newest checkpoint.
"""

import difflib
import math
import shlex
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from conf import secrets
from conf.checkpoints import CHECKPOINTS
from conf.errors import LongrunError
from data_pipeline.artifact import MANIFEST, ArtifactError
from launchers import preflight
from launchers.base import DONE, LOST, STOPPED_EARLY, Ahead, Ended, Launcher, Queue, Running
from launchers.display import Display
from launchers.interrupts import KILLED, heeded, pass_on
from launchers.local import Local
from launchers.restarts import Restarts
from launchers.sweep import best, record
from launchers.sweep.book import Book
from launchers.sweep.config import SweepConfig
from launchers.sweep.figures import Figures
from launchers.sweep.space import corners, read, settings

if TYPE_CHECKING:
    from optuna import Trial

POLL_S = 0.2
NOTE_S = 30.0
"""Between two notes of how far a trial has come."""
LAST_LINES = 15


class SweepError(LongrunError):
    """A sweep that cannot be run, or not to its end."""


@dataclass
class Attempt:
    """One trial being run, over its restarts.

    Args:
        earlier_s: wall time it took before this sweep was started.
        reported: steps whose values the journal has.
        launcher: who starts it: of several trials at once on one machine, for its part of that.
        ending: it fell behind and was asked to stop.
    """

    trial: "Trial"
    figures: Figures
    log: Path
    earlier_s: float
    reported: set[int]
    restarts: Restarts
    launcher: Launcher
    running: Running = field(init=False)
    started_s: float = field(default_factory=time.monotonic)
    noted_s: float = 0.0
    ending: bool = False
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    @property
    def seconds(self) -> float:
        return self.earlier_s + time.monotonic() - self.started_s


class Over:
    """In the place of the processes of a trial that is done."""

    def poll(self) -> Ended:
        return Ended(DONE)

    def stop(self) -> None:
        pass

    def kill(self) -> None:
        pass


class Sweep:
    """Runs a sweep in a directory that this process holds."""

    def __init__(self, config: SweepConfig):
        self.config = config
        self.root = Path(config.root)
        self.space = read(config.values)
        self.trials = config.search.trials(self.space, config.trials)
        self.book: Book
        self.display = Display([])
        self.redacted = secrets.redactor()
        self.groups: list[str] = []
        self.running: dict[int, Attempt] = {}
        self.at_once = config.concurrent
        divided = isinstance(config.launcher, Local) and config.concurrent > 1
        self.free = deque(config.launcher.parts(config.concurrent, config.processes) if divided else [])
        self.stop_requests = 0
        self.failures = 0
        self.fatal = ""

    def call(self, number: int, params: dict[str, object]) -> list[str]:
        """The command line of a trial, after `python -m`."""
        module, *given = self.config.fixed
        named = [f"name={self.config.name}/{number:03d}"] if module == "train" else []
        return [module, *named, *given, *settings(params), f"run_dir={self.directory(number)}"]

    def directory(self, number: int) -> Path:
        return self.root / f"{number:03d}"

    def check(self) -> None:
        """Compose the command with the extreme values of every key.

        Raises:
            SweepError: a configuration that would be refused; names the values, and what is wrong with them.
        """
        asked = list(corners(self.space))
        calls = [preflight.Check(" ".join(settings(p)), self.call(0, p), self.config.processes, []) for p in asked]
        answers = preflight.answers(calls)
        wrong: dict[str, list[str]] = {}
        for values, answer in answers.items():
            if answer.problem:
                wrong.setdefault(answer.problem, []).append(values)
            else:
                self.groups = answer.groups
        if wrong:
            told = [
                f"with {values[0]}{f' and {len(values) - 1} more' if len(values) > 1 else ''}:\n  "
                + problem.replace("\n", "\n  ")
                for problem, values in wrong.items()
            ]
            raise SweepError("nothing was started.\n" + "\n".join(told))

    def run(self) -> int:
        """Run what is to be run; returns the exit code.

        Raises:
            OccupiedError: the directory holds another sweep.
            SweepError: a configuration would be refused, too many trials failed, or none has the figure.
        """
        self.check()
        record.check_same(self.root, self.config)
        self.book = Book(self.root, self.config, self.space)
        record.write(self.root, self.config, self.book)
        waiting = deque(trial for trial in self.book.unfinished() if not self._on_its_way_out(trial))
        queue = self.config.launcher
        if isinstance(queue, Queue) and self.config.search.independent:
            while len(self.book.outcomes()) < self.trials:
                waiting.append(self.book.propose())
            self._put_into(queue, waiting)
            if queue.detach and any(not self._is_done(trial) for trial in waiting):
                record.write(self.root, self.config, self.book)
                self.display.say("The trials go on without this process; the same command later looks on.")
                return DONE
            self.at_once = max(1, len(waiting))  # the queue sees to the limit
        with heeded(self._interrupted):
            while True:
                self._start_what_can_be(waiting)
                if not self.running:
                    break
                for number in list(self.running):
                    self._look(number)
                time.sleep(POLL_S)
        return self._conclude()

    def _put_into(self, queue: Queue, trials: Iterable["Trial"]) -> None:
        ahead = []
        for trial in trials:
            call, directory = self.call(trial.number, trial.params), self.directory(trial.number).resolve()
            if not self._is_done(trial):
                ahead.append(Ahead(directory.name, directory, call, self.config.processes, [], False))
        if ahead and (job := queue.together(self.config.name, ahead, self.config.concurrent)):
            self.display.say(f"{job}: {len(ahead)} trials")

    def _is_done(self, trial: "Trial") -> bool:
        return (self.directory(trial.number) / MANIFEST).exists()

    def _on_its_way_out(self, trial: "Trial") -> bool:
        """Whether it was to be ended when the sweep was killed; it is now, with what runs of it in a queue."""
        curve = self.book.outcome(trial).curve
        ending = bool(curve) and not self._is_done(trial) and self.book.falls_behind(trial)
        if ending:
            if isinstance(self.config.launcher, Queue):
                self.config.launcher.end(self.directory(trial.number).resolve())
            self.book.prune(trial)
        return ending

    def _start_what_can_be(self, waiting: "deque[Trial]") -> None:
        while len(self.running) < self.at_once and not self._over():
            if waiting:
                self._start(waiting.popleft())
            elif len(self.book.outcomes()) < self.trials:
                self._start(self.book.propose())
            else:
                return

    def _over(self) -> bool:
        """Whether no further trial is started."""
        return bool(self.stop_requests or self.fatal or self.failures >= self.config.max_failures)

    def _start(self, trial: "Trial") -> None:
        earlier = self.book.outcome(trial)
        self.book.failed(trial, "")
        log = self.root / "logs" / f"{trial.number:03d}.log"
        log.parent.mkdir(exist_ok=True)
        figures = Figures(self.directory(trial.number), self.config.figure)
        restarts = Restarts(self.directory(trial.number) / CHECKPOINTS, self.config.restarts)
        launcher = self.free.popleft() if self.free else self.config.launcher
        attempt = Attempt(trial, figures, log, earlier.seconds, set(earlier.curve), restarts, launcher)
        self.running[trial.number] = attempt
        again = ", again" if self.directory(trial.number).exists() else ""
        if self._is_done(trial):  # while no sweep looked on
            attempt.running = Over()
            return
        self._say(trial, f"starts{again}: {' '.join(settings(trial.params))}", style="bold cyan")
        self._launch(attempt)

    def _launch(self, attempt: Attempt) -> None:
        call = self.call(attempt.trial.number, attempt.trial.params)
        with open(attempt.log, "a") as log:
            log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(['python', '-m', *call])}\n")

        def output(rank: int, line: str) -> None:
            line = self.redacted(line)
            attempt.last_lines.append(line)
            with self.display.lock, open(attempt.log, "a") as log:
                log.write(line + "\n" if rank == 0 else f"[{rank}] {line}\n")

        attempt.running = attempt.launcher.start(call, self.config.processes, output)

    def _look(self, number: int) -> None:
        attempt = self.running[number]
        ended = attempt.running.poll()  # first: what an ended trial wrote is all there
        for step, value in attempt.figures.new():
            if not attempt.ending and step not in attempt.reported:
                self._report(attempt, step, value, done=ended is not None and ended.code == DONE)
        if ended:
            self._ended(attempt, ended)
        elif attempt.seconds - attempt.noted_s > NOTE_S:
            attempt.noted_s = attempt.seconds
            self.book.came_to(attempt.trial, attempt.figures.steps, attempt.seconds)

    def _report(self, attempt: Attempt, step: int, value: float, done: bool) -> None:
        """Note a value; end the trial if it falls behind, unless it is done: then it counts like any other."""
        attempt.reported.add(step)
        attempt.trial.report(value, step)
        if not done and self.book.falls_behind(attempt.trial):
            attempt.ending = True
            attempt.running.stop()
            self._say(attempt.trial, f"falls behind at step {step} with {self._shown(value)}: it ends here", "yellow")

    def _ended(self, attempt: Attempt, ended: Ended) -> None:
        again = ended.code in (STOPPED_EARLY, LOST) and not attempt.ending and not self._over()
        if again and attempt.restarts.another():
            why = "stopped early with a checkpoint" if ended.code == STOPPED_EARLY else f"was lost: {ended.reason}"
            self._say(attempt.trial, f"{why}; start {attempt.restarts.count + 1}", style="yellow")
            self._launch(attempt)
            return
        del self.running[attempt.trial.number]
        if attempt.launcher is not self.config.launcher:
            self.free.append(attempt.launcher)
        self.book.came_to(attempt.trial, attempt.figures.steps, attempt.seconds)
        if self._is_done(attempt.trial) or (ended.code == DONE and not attempt.ending):
            self._finished(attempt)
        elif attempt.ending:
            self.book.prune(attempt.trial)
        elif again:
            self._failed(attempt, f"{ended.reason or 'it stopped early'} ({attempt.restarts.starts}; see restarts)")
        elif ended.code not in (STOPPED_EARLY, LOST):
            self._failed(attempt, ended.reason)
        record.write(self.root, self.config, self.book)

    def _finished(self, attempt: Attempt) -> None:
        curve = self.book.outcome(attempt.trial).curve
        try:
            value = attempt.figures.final(list(curve.values())[-1] if curve else None)
        except ArtifactError as error:
            return self._failed(attempt, f"it exited with 0, but {error}")
        if value is None:
            names = sorted(attempt.figures.names)
            near = difflib.get_close_matches(self.config.figure, names, n=3)
            fix = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names) or 'none'}."
            self.fatal = f"trial {attempt.trial.number} has no figure {self.config.figure!r}, nor will others: {fix}"
            return self._failed(attempt, self.fatal)
        if math.isnan(value):
            return self._failed(attempt, f"its {self.config.figure} is not a number")
        self.book.finish(attempt.trial, value)
        first = (leader := self.book.best()) is not None and leader.number == attempt.trial.number
        self._say(attempt.trial, f"is done with {self._shown(value)}{', the best so far' if first else ''}", "green")
        if first:
            self._keep_best()

    def _failed(self, attempt: Attempt, why: str) -> None:
        self.failures += 1
        self.book.failed(attempt.trial, why)
        self._say(attempt.trial, f"failed: {why}. The last lines of {attempt.log}:", style="bold red")
        for line in attempt.last_lines:
            self.display.say(f"    {line}", style="")
        if self._over():
            for other in self.running.values():
                other.running.stop()

    def _keep_best(self) -> None:
        leader = self.book.best()
        if leader is None or "experiment" not in self.groups:  # else the command has no experiments
            return
        about = f"{self.config.name}: {self._shown(leader.value)} in trial {leader.number}"
        overrides = [*self.config.fixed[1:], *settings(leader.params), f"name={self.config.name}_best"]
        best.write(Path(self.config.best), about, overrides, self.groups)

    def _conclude(self) -> int:
        self._keep_best()
        record.write(self.root, self.config, self.book)
        record.show(self.display, self.config, self.book)
        self.display.say(record.drawn(self.root), style="")
        if self.stop_requests:
            self.display.say("Stopped on request. The same command goes on from here.", style="yellow")
            return STOPPED_EARLY if self.stop_requests < 2 else KILLED
        if self.fatal:
            raise SweepError(f"{self.fatal}\nGive the name of another `figure`; the trials that there are stand.")
        if self.failures >= self.config.max_failures:
            raise SweepError(
                f"{self.failures} trials failed; max_failures={self.config.max_failures} bears no more. Their logs are "
                f"in {self.root / 'logs'}. Mend what they failed of and start again: they go on where they were."
            )
        return DONE if self.book.best() else 1

    def _say(self, trial: "Trial", text: str, style: str = "bold") -> None:
        self.display.say(f"{trial.number:03d} {text}", style=style)

    def _shown(self, value: float | None) -> str:
        return f"{self.config.figure} {record.shown(value)}"

    def _interrupted(self) -> None:
        """The trials are asked to write a checkpoint; the second time they are killed."""
        self.stop_requests += 1
        running = [attempt.running for attempt in self.running.values()]
        pass_on(self.config.launcher, running, now=self.stop_requests > 1)
