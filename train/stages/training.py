"""Stages that change weights: pre-training, SFT, DPO. They differ in their data and objective only."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.registry import register
from train.stages.base import Stage

if TYPE_CHECKING:
    from train.config import RunConfig


@register("stage", "training")
@dataclass(frozen=True)
class Training(Stage):
    """Train for a number of steps and write the weights as a Hugging Face directory `model/`.

    Args:
        kind: what the run is called in manifests: pretrain, sft, dpo.
        steps: optimizer steps.
        global_batch: samples per step, over all ranks and micro-batches.
        precision: compute precision: "auto" is bf16 where the device has it natively, else fp32; "bf16"; "fp32".
            Master weights, moments and reductions are always fp32.
        compile: compile each block with torch.compile.
        deterministic: same layout, same bits: deterministic kernels only.
        clip: largest global gradient norm; 0 does not clip.
        ema: decay per step of the exponential moving average of the weights; 0 keeps none. With one, the weights
            that are validated and written are the averaged ones.
        validate_every: steps between validations; 0 validates at the end only.
        validation_batches: global batches per validation.
        patience: validations without a better loss after which the run ends (early stopping); 0 never.
        checkpoint_every: steps between checkpoints.
        keep: newest checkpoints kept on disk.
        max_skipped: consecutive steps that may be skipped for a loss or norm that is not finite before the run stops.
        log_every: steps between log lines.
    """

    kind: str = "pretrain"
    steps: int = 100
    global_batch: int = 16
    precision: str = "auto"
    compile: bool = False
    deterministic: bool = False
    clip: float = 1.0
    ema: float = 0.0
    validate_every: int = 0
    validation_batches: int = 8
    patience: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    max_skipped: int = 0
    log_every: int = 1

    def run(self, config: "RunConfig", resolved: dict[str, Any]) -> int:
        raise NotImplementedError
