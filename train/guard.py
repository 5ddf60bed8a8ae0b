"""Faults that raise no error: what is done about each kind, and the patrol that looks for those of memory.

    kind        what it is                                                  found by
    nonfinite   a loss or gradient norm that is NaN or infinite             every step, before its update
    spike       one far above those of the last steps                       every step, before its update
    computation gradients that come out otherwise when they are computed again   every so many steps, before the update
    memory      state that changed between two updates                      fingerprints after one and before the next
    replicas    ranks that should hold the same weights or moments do not   fingerprints compared over ranks

On 16,384 GPUs 6 of 419 unexpected interruptions in 54 days were silent corruption (Llama Team 2024, arXiv:2407.21783,
table 5), Gemini's training met one "every week or two" (Gemini Team 2023, arXiv:2312.11805, section 5), and most of
them disturb a run so little that its loss does not show them (Ma et al. 2025, arXiv:2502.12340).
"""

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import LongrunError, LostError, Problem
from parallel.checksums import Checksums, Replicas, outvoted
from parallel.engine import Engine
from parallel.verdict import spans

T = TypeVar("T")

SKIP, ROLL_BACK, STOP = "skip", "roll_back", "stop"
NONFINITE, SPIKE, COMPUTATION = "nonfinite", "spike", "computation"
MEMORY, REPLICAS = "memory", "replicas"
OF_STEPS = (NONFINITE, SPIKE, COMPUTATION)
"""Those that befall a step. The others are found by the next patrol, so two accidents may be told at one step."""
SHOWN = 3
"""Tensors that a message names."""


class FaultError(LongrunError):
    """A silent fault; the message says which, where it can be told on which rank and host, and in which tensor.

    Args:
        kind: nonfinite, spike, computation, memory or replicas.
        step: the step after which it was found, or that it befell.
        text: the message.
    """

    def __init__(self, kind: str, step: int, text: str):
        super().__init__(text)
        self.kind, self.step = kind, step


class StartAgainError(FaultError):
    """A fault before the first checkpoint: the way back is the start."""

    exit_code = LostError.exit_code


@dataclass(frozen=True)
class Guard:
    """What is looked for, and what is done about what is found: "skip" leaves the step out, "roll_back" loads the
    newest checkpoint and trains on from there, "stop" ends the run. Of these only `spike_strength` and `spike_window`
    change what is trained where nothing is broken.

    Args:
        nonfinite: about a step whose loss or gradient norm is not finite; all ranks leave it out in any case.
        spike: about a step whose loss or gradient norm is a spike; the same.
        spike_strength: standard deviations above the mean of the last `spike_window` steps that were not left out from
            which on a loss or a norm is a spike, for instance 6; 0 looks for none. Half a window of steps is taken
            before the first is judged.
        spike_window: steps.
        max_skipped: steps in a row that "skip" leaves out, for whichever reason, before the run stops.
        computation: about a step whose gradients were computed twice and differ in a bit.
        repeat_every: steps between those that are computed twice; 0 none: it costs as much as a step. Needs
            stage.deterministic. Only what goes wrong in one of the two passes is seen.
        memory: about weights, moments, averages or counters that change while nobody writes them; cannot be skipped.
        replicas: about ranks that should hold the same of these and do not; cannot be skipped.
        every: steps between the patrols that look for both; also before every checkpoint; 0 never. Replicas stay
            different, so each patrol finds what happened since the last one; of memory it watches one step.
        max_roll_backs: times that the run goes back to the same checkpoint before it stops. A step that is left out
            for the same reason for the second time stops it, too.
    """

    nonfinite: str = STOP
    spike: str = SKIP
    spike_strength: float = 0.0
    spike_window: int = 128
    max_skipped: int = 8
    computation: str = ROLL_BACK
    repeat_every: int = 0
    memory: str = ROLL_BACK
    replicas: str = ROLL_BACK
    every: int = 10
    max_roll_backs: int = 3

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        """Values outside their range."""
        found = []
        for kind in (NONFINITE, SPIKE, COMPUTATION, MEMORY, REPLICAS):
            answers = (ROLL_BACK, STOP) if kind in (MEMORY, REPLICAS) else (SKIP, ROLL_BACK, STOP)
            if getattr(self, kind) not in answers:
                found.append(Problem(f"guard.{kind}", getattr(self, kind), f"one of {', '.join(answers)}"))
        for key in ("spike_strength", "max_skipped", "repeat_every", "every", "max_roll_backs"):
            if getattr(self, key) < 0:
                found.append(Problem(f"guard.{key}", getattr(self, key), "must be at least 0"))
        if self.spike_window < 2:
            found.append(Problem("guard.spike_window", self.spike_window, "must be at least 2; 128 is usual"))
        if self.repeat_every > 0 and not getattr(config.stage, "deterministic", True):
            fix = "computes the same bits twice only with stage.deterministic=true"
            found.append(Problem("guard.repeat_every", self.repeat_every, fix))
        if self.repeat_every > 0 and not getattr(config.engine, "repeats", False):
            found.append(Problem("guard.repeat_every", self.repeat_every, "needs engine=native; use 0 with others"))
        return found

    def skipped(self, step: int, figures: Mapping[str, float], in_a_row: int) -> None:
        """Judge a step that all ranks left out.

        Args:
            figures: its `loss` and `grad_norm`, and `differing`, where it was computed twice.
            in_a_row: steps left out up to this one.

        Raises:
            FaultError: the policy is another than to skip it, or too many were skipped.
        """
        kind = kind_of(figures)
        if getattr(self, kind) == SKIP and in_a_row <= self.max_skipped:
            return
        text = f"step {step} was left out, {why(figures)}"
        advice = "Lower the learning rate (optim, schedule) or stage.clip, or look at the data of that step"
        advice += ", or raise guard.spike_strength" if kind == SPIKE else ""
        if kind == COMPUTATION:
            advice = "A device computes wrongly, now and then: look for it with stage=preflight"
        if getattr(self, kind) == SKIP:
            text = f"{text}; it is number {in_a_row} in a row, and guard.max_skipped={self.max_skipped}"
        raise FaultError(kind, step, f"{text}. {advice}.")

    def rolls_back(self, kind: str) -> bool:
        """Whether such a fault is a reason to go back; else it ends the run."""
        return getattr(self, kind) == ROLL_BACK

    def judge_roll_back(self, fault: FaultError, to: int, earlier: Sequence[Sequence[str | int]]) -> None:
        """Whether a run that went back to step `to` may train on from there.

        Args:
            earlier: the roll backs before: kind, step of the fault, and where to.

        Raises:
            FaultError: it is the same fault again, or the run does not get ahead.
        """
        same = fault.kind in OF_STEPS and any((kind, step) == (fault.kind, fault.step) for kind, step, _ in earlier)
        times = sum(step == to for *_, step in earlier)
        if same:
            reason = (
                f"The run went back to the checkpoint of step {to} and met it again at the same step, so it is no "
                "accident: look at the data and the code of that step, or remove the newest checkpoint to go on from "
                "an earlier one, should it hold the fault."
            )
        elif times >= self.max_roll_backs:
            reason = (
                f"The run went back to the checkpoint of step {to} {times} time(s) before: "
                f"guard.max_roll_backs={self.max_roll_backs}. Take the machine that is named out of the run."
            )
        else:
            return
        raise FaultError(fault.kind, fault.step, f"{fault} {reason}")


def kind_of(figures: Mapping[str, float | int | str]) -> str:
    """Why a step was left out: a spike has figures."""
    if float(figures.get("differing", 0)) > 0:
        return COMPUTATION
    finite = math.isfinite(float(figures["loss"])) and math.isfinite(float(figures["grad_norm"]))
    return SPIKE if finite else NONFINITE


def why(figures: Mapping[str, float | int | str]) -> str:
    """The same in words, with the figures."""
    kind = kind_of(figures)
    if kind == COMPUTATION:
        return f"computed twice, its gradients differ on {figures['differing']:.0f} rank(s)"
    reason = "far above those before" if kind == SPIKE else "not finite"
    return f"loss or gradient norm {reason}: loss {figures['loss']:.4g}, norm {figures['grad_norm']:.4g}"


@dataclass
class _Pending:
    """Findings on their way to the host.

    Args:
        step: after which they were made.
        sums_T: this rank's fingerprints, where they were taken.
        changed_T: which tensors changed before the step's update, where that was looked at.
        told_RN: of each rank the number of tensors that changed, and its sums_K.
        copied: when they are there.
    """

    step: int
    sums_T: Tensor | None
    changed_T: Tensor | None
    told_RN: Tensor
    copied: torch.cuda.Event | None


class Patrol:
    """Looks at the state that an engine keeps, every so many steps, without waiting for the device: what is found is
    read one step late, but for a checkpoint. All ranks make it, and call every method, together.

    Args:
        engine: whose; its `before_update` is taken.
        every: steps between patrols; 0 none.
        replicas: of this engine, where they are known from an earlier patrol.
    """

    def __init__(self, engine: Engine, every: int, replicas: Replicas | None = None):
        self.engine, self.every = engine, every
        self._due = False
        self._kept_T: Tensor | None = None
        """Fingerprints after an update."""
        self._changed_T: Tensor | None = None
        self._pending: _Pending | None = None
        if every:
            self._checksums = Checksums(engine.device)
            self._replicas = replicas or Replicas(engine.state(), engine.device)
            engine.before_update = self._before_update

    def check(self, step: int, wait: bool = False) -> None:
        """Take note of the state after a step, where it is due, and read what was noted before.

        Args:
            step: steps done.
            wait: do it now, and know now: what is saved must be good.

        Raises:
            FaultError: state changed between updates, or replicas differ; the same on all ranks.
        """
        if not self.every:
            return
        self._read()
        due = wait or step % self.every == 0
        if due or self._changed_T is not None:
            self._note(step, due)
        if wait:
            self._read()

    def _before_update(self) -> None:
        if self._kept_T is not None:
            self._changed_T = self._fingerprints() != self._kept_T
            self._kept_T = None

    def _fingerprints(self) -> Tensor:
        return self._checksums.of(self.engine.state().values())

    def _note(self, step: int, due: bool) -> None:
        changed_T, self._changed_T = self._changed_T, None
        self._kept_T = self._fingerprints() if due else None
        told_N = torch.zeros(1 + self._replicas.width, dtype=torch.int64, device=self.engine.device)
        if changed_T is not None:
            told_N[0] = changed_T.sum()
        if self._kept_T is not None:
            told_N[1:] = self._replicas.of(self._kept_T)
        told_RN = told_N.new_empty(self._replicas.size * len(told_N))
        dist.all_gather_into_tensor(told_RN, told_N)
        told_RN = told_RN.view(self._replicas.size, -1).to("cpu", non_blocking=True)
        copied = None
        if told_N.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending = _Pending(step, self._kept_T, changed_T, told_RN, copied)

    def _read(self) -> None:
        if (pending := self._pending) is None:
            return
        self._pending = None
        if pending.copied is not None:
            pending.copied.synchronize()
        told_RN = pending.told_RN.tolist()
        if any(row[0] for row in told_RN):
            raise self._changed(pending)
        if differing := self._replicas.differing([row[1:] for row in told_RN]):
            raise self._diverged(pending, differing)

    def _changed(self, pending: _Pending) -> FaultError:
        """Everything that is known of state that changed between updates."""
        numbers = [] if pending.changed_T is None else pending.changed_T.nonzero().flatten().tolist()
        told = _everyones([self._replicas.names[number] for number in numbers])
        where = [f"{_some(names)} on {_rank(rank, host)}" for rank, (host, names) in enumerate(told) if names]
        return FaultError(
            MEMORY,
            pending.step,
            f"state changed between the updates of steps {pending.step - 1} and {pending.step}, while nobody wrote it: "
            f"{'; '.join(where)}. A bit of memory flipped there, or something wrote where it should not have.",
        )

    def _diverged(self, pending: _Pending, differing: list[tuple[int, ...]]) -> FaultError:
        """Everything that is known of replicas that differ."""
        assert pending.sums_T is not None
        sums_T = pending.sums_T.tolist()
        mine = {
            (kind, name): sums_T[number]
            for kind in differing
            for name, number in self._replicas.shared_names(kind).items()
        }
        told = _everyones(mine)
        held: dict[tuple[tuple[int, ...], str], dict[int, int]] = {}
        for rank, (_, theirs) in enumerate(told):
            for piece, value in theirs.items():
                held.setdefault(piece, {})[rank] = value
        names: dict[tuple[int, ...], list[str]] = {}
        for (_, name), sums in held.items():
            if wrong := outvoted(sums):
                names.setdefault(tuple(wrong), []).append(name)
        where = []
        for ranks, different in names.items():
            hosts = sorted({told[rank][0] for rank in ranks})
            who = f"rank {spans(ranks)} (on {', '.join(hosts)})"
            where.append(f"{_some(different)} {'between' if ranks in differing else 'on'} {who}")
        return FaultError(
            REPLICAS,
            pending.step,
            f"after step {pending.step} ranks that should hold the same bits do not: {'; '.join(where)}. A bit flipped "
            "in memory, in a computation or on the way there since the last patrol.",
        )


def _everyones(mine: T) -> list[tuple[str, T]]:
    """What each rank has to say, and its host."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (socket.gethostname(), mine))
    return told


def _rank(rank: int, host: str) -> str:
    return f"rank {rank} (on {host})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
