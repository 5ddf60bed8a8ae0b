"""From the figures of a step to log lines: read one step late, agreed by all ranks, never waiting for the device."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import MicroBatch
from parallel import distributed
from parallel.engine import StepResult
from train.guard import SPIKE, Guard, kind_of, why
from train.metrics.base import Metrics, Value
from train.progress import Progress
from train.stragglers import Stragglers
from train.throughput import Clock, peak_memory


@dataclass(frozen=True)
class Rates:
    """What turns counts into figures.

    Args:
        flops_per_token: of the forward and backward pass.
        peak_flops: FLOP/s of all devices together.
    """

    flops_per_token: float
    peak_flops: float


@dataclass
class _Pending:
    """A step whose figures are on their way to the host."""

    step: int
    learning_rate: float
    training_s: float
    names: list[str]
    figures: Tensor
    copied: torch.cuda.Event | None
    shared: Tensor
    agreed: dist.Work


class Monitor:
    """Reads the results of training steps, one step after they were made.

    Args:
        progress: tokens, samples and skipped steps are counted into it.
        metrics: where lines go; with no sinks on all ranks but the first.
        clock: tells evaluation, which is left out of the throughput.
        rates: see there.
        steps: of the whole run.
        log_every: steps between lines.
        guard: what is done about skipped steps.
        copies: ranks that see the same samples (world size / data-parallel ranks).
        device: whose memory is shown.
        group: of all ranks, for small sums of every step on the host; used by nobody else, so that they never
            interleave with the step's collectives.
        straggler: times the median of its peers' own time per step from which on a rank is named; 0 names none.
        stages: pipeline stages, whose ranks are peers.
    """

    def __init__(
        self,
        progress: Progress,
        metrics: Metrics,
        clock: Clock,
        rates: Rates,
        *,
        steps: int,
        log_every: int,
        guard: Guard,
        copies: int,
        device: torch.device,
        group: dist.ProcessGroup,
        straggler: float = 0.0,
        stages: int = 1,
    ):
        self.progress = progress
        self.metrics = metrics
        self.clock = clock
        self.rates = rates
        self.steps = steps
        self.log_every = log_every
        self.guard = guard
        self.copies = copies
        self.device = device
        self.last: dict[str, Value] = {}
        """The newest line."""
        self.stop = False
        """Whether a rank was asked to stop; the same on all ranks."""
        self._pending: _Pending | None = None
        self._group = group
        self._stragglers = Stragglers(straggler, stages, group) if straggler else None
        self._data = (progress.step, clock.seconds["data"])
        """(steps, seconds of waiting for data) at the last look at the ranks' own times."""
        self._marks = [(self._training_s(), progress.tokens)]
        """(seconds of training, tokens) at the start and after each step that was read."""
        self._line = self._marks[0]

    def record(
        self, step: int, result: StepResult, micro_batches: Sequence[MicroBatch], learning_rate: float, stop: bool
    ) -> None:
        """Take note of a step and read the one before.

        Args:
            step: steps done, this one included.
            micro_batches: what this rank trained on.
            stop: whether this rank was asked to stop.

        Raises:
            FaultError: a step was skipped that may not be, or too many in a row.
        """
        distributed.reached(step)
        self._read_pending()
        names = ["loss", "grad_norm", "skipped", *result.metrics]
        scalars = [result.loss, result.grad_norm, result.skipped, *result.metrics.values()]
        figures = torch.stack([s.detach().double() for s in scalars]).to("cpu", non_blocking=True)
        copied = None
        if result.loss.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        samples = sum(len(batch.samples_B.unique()) for batch in micro_batches)  # a pair is one sample
        tokens = sum(int((batch.documents_BL >= 0).sum()) for batch in micro_batches)
        shared = torch.tensor([tokens, samples, stop], dtype=torch.int64)
        agreed = dist.all_reduce(shared, group=self._group, async_op=True)
        assert agreed is not None
        self._pending = _Pending(step, learning_rate, self._training_s(), names, figures, copied, shared, agreed)
        self._look(step)

    def _look(self, step: int) -> None:
        """Where a step was profiled, compare the ranks' own times."""
        own_s, self.clock.own_s = self.clock.own_s, None
        if own_s is None or self._stragglers is None:
            return
        (steps, data_s), self._data = self._data, (step, self.clock.seconds["data"])
        self._stragglers.look(own_s + (self._data[1] - data_s) / (step - steps))

    def flush(self) -> None:
        """Read what is pending, so that `progress` is that of the last step."""
        self._read_pending()

    def _read_pending(self) -> None:
        if (pending := self._pending) is None:
            return
        self._pending = None
        if pending.copied is not None:
            with distributed.on_device():
                pending.copied.synchronize()
        pending.agreed.wait()
        for text in self._stragglers.read() if self._stragglers else ():
            self.metrics.alert("straggler", text)
        figures = dict(zip(pending.names, pending.figures.tolist(), strict=True))
        tokens, samples, stop = pending.shared.tolist()
        self.stop = self.stop or stop > 0
        self.progress.tokens += tokens // self.copies
        self.progress.samples += samples // self.copies
        skipped = bool(figures.pop("skipped"))
        if skipped:
            self.progress.skipped.append(pending.step)
        self._marks.append((pending.training_s, self.progress.tokens))
        if pending.step % self.log_every == 0 or pending.step in (1, self.steps) or skipped:
            self._log(pending, dict(figures), skipped)
        if skipped:
            self.guard.skipped(pending.step, figures, self.progress.skipped_in_a_row)
            kind = SPIKE if kind_of(figures) == SPIKE else "fault"
            self.metrics.alert(kind, f"step {pending.step} was skipped, {why(figures)}")

    def _log(self, pending: _Pending, figures: dict[str, float], skipped: bool) -> None:
        before, self._line = self._line, self._marks[-1]
        tokens_per_s = _rate(before, self._line)
        tokens_left = self.progress.tokens / pending.step * (self.steps - pending.step)
        line: dict[str, Value] = {
            "loss": figures.pop("loss"),
            "lr": pending.learning_rate,
            "grad_norm": figures.pop("grad_norm"),
            **figures,
            "samples": self.progress.samples,
            "tokens": self.progress.tokens,
            "tokens_per_s": tokens_per_s,
            "mfu": self.mfu(tokens_per_s),
            "memory_bytes": peak_memory(self.device),
            "eta_s": tokens_left / max(tokens_per_s, 1e-9),
        }
        if skipped:
            line["skipped"] = 1
            line["spike"] = int(kind_of(line) == SPIKE)
        self.last = line
        self.metrics.log(pending.step, line)

    def _training_s(self) -> float:
        """A clock that stands still during validations."""
        return time.perf_counter() - self.clock.seconds["evaluation"] - self.clock.seconds["profile"]

    def mfu(self, tokens_per_s: float) -> float:
        return tokens_per_s * self.rates.flops_per_token / self.rates.peak_flops

    def summary(self) -> dict[str, float]:
        """Throughput of this process without its first two steps, which compile, allocate and fill the prefetch."""
        tokens_per_s = _rate(self._marks[min(2, max(0, len(self._marks) - 2))], self._marks[-1])
        return {"tokens_per_s": tokens_per_s, "mfu": self.mfu(tokens_per_s)}


def _rate(before: tuple[float, int], after: tuple[float, int]) -> float:
    """Tokens per second between two marks."""
    return (after[1] - before[1]) / max(after[0] - before[0], 1e-9)
