"""TensorBoard event files in `tensorboard/` of the run directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.registry import register
from train.metrics.base import Run, Sink, Value, numbers


@register("logger", "tensorboard", package="logger.tensorboard")
@dataclass(frozen=True)
class TensorBoard:
    """Write scalars for TensorBoard. Look at them with `tensorboard --logdir runs`.

    Args:
        flush_s: seconds between writes to disk.
    """

    flush_s: int = 30

    def open(self, run: Run) -> Sink:
        return _Events(run.directory / "tensorboard", run.resumed_step, self.flush_s)


class _Events:
    def __init__(self, directory: Path, resumed_step: int, flush_s: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier, killed process wrote for steps that are trained again.
        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1, flush_secs=flush_s)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        group = "validation" if "validation_loss" in values else "train"
        for name, value in numbers(values):
            self._writer.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, step)

    def close(self, summary: Mapping[str, Value]) -> None:
        self._writer.close()
