"""TensorBoard event files in `tensorboard/` of the run directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from conf.registry import register
from train.metrics.base import Run, Sink, Value, grouped, numbers


@register("logger", "tensorboard", package="logger.tensorboard")
@dataclass(frozen=True)
class TensorBoard:
    """Write scalars for TensorBoard. Look at them with `tensorboard --logdir runs`.

    Args:
        flush_s: seconds between writes to disk.
    """

    flush_s: int = 30
    apart: ClassVar[bool] = True

    def open(self, run: Run) -> Sink:
        return _Events(run.directory / "tensorboard", run.resumed_step, self.flush_s)


class _Events:
    def __init__(self, directory: Path, resumed_step: int, flush_s: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier, killed process wrote for steps that are trained again.
        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1, flush_secs=flush_s)
        self._step = resumed_step

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self._step = step
        for name, value in numbers(grouped(values)):
            self._writer.add_scalar(name, value, step)

    def system(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def alert(self, kind: str, text: str) -> None:
        self._writer.add_text(f"alert/{kind}", text, self._step)

    def close(self, summary: Mapping[str, Value]) -> None:
        self._writer.close()
