"""Stages that change weights: pre-training, SFT, DPO. They differ in their data and objective only."""

import gc
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.checkpoints import CHECKPOINTS
from conf.errors import OccupiedError, Problem
from conf.registry import register
from data_pipeline.artifact import fingerprint, finished, locked
from parallel import determinism, distributed
from parallel.engine import Settings
from parallel.layout import DEFERRING_SCHEDULES, Layout
from parallel.precision import NO_FP8, PRECISIONS, has_fp8
from parallel.verdict import BrokenError
from train.checkpoint import committed
from train.checkpoint.committed import CheckpointError
from train.goodput import Ledger, age_s
from train.guard import FaultError, Guard
from train.models import hf
from train.models.hf import HuggingFaceError
from train.rundir import check_agreement, check_same, check_unfinished, recipe, together, with_options, write_config
from train.session import Session
from train.signals import StopSignals
from train.stages.base import DONE, Stage
from train.start import Start
from train.throughput import Clock

STACKS = "stacks"
"""What each rank was at when an attempt was lost."""

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
        precision: compute precision: "auto" is bf16 where the device has it natively, else fp32; "bf16"; "fp32";
            "fp8" (bf16 with the blocks' linear layers in 8 bits; CUDA, needs the package torchao).
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
        keep_every: checkpoints of steps that this divides are kept for good; 0: none.
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
    keep_every: int = 0
    log_every: int = 1

    def settings(self, seed: int, guard: Guard) -> Settings:
        """What the engine must know of this stage."""
        return Settings(
            precision=self.precision,
            compile=self.compile,
            clip=self.clip,
            ema=self.ema,
            deterministic=self.deterministic,
            seed=seed,
            skip_spikes=guard.spike_strength,
            spike_window=guard.spike_window,
            repeat_every=guard.repeat_every,
        )

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Values outside their range, and a layout that does not fit."""
        found = []
        for key in ("steps", "validation_batches", "keep", "log_every"):
            if getattr(self, key) < 1:
                found.append(Problem(f"stage.{key}", getattr(self, key), "must be at least 1"))
        for key in ("clip", "validate_every", "patience", "checkpoint_every", "keep_every"):
            if getattr(self, key) < 0:
                found.append(Problem(f"stage.{key}", getattr(self, key), "must be at least 0"))
        if not 0 <= self.ema < 1:
            found.append(Problem("stage.ema", self.ema, "a decay in [0, 1), for instance 0.999"))
        if self.precision not in (*PRECISIONS, "fp8"):
            found.append(Problem("stage.precision", self.precision, f"one of {', '.join(PRECISIONS)}, fp8"))
        if self.precision == "fp8":
            found += self._fp8_problems(config.parallel, config.dry_run)
        if self.patience > 0 and self.validate_every == 0:
            found.append(Problem("stage.patience", self.patience, "needs validations: set stage.validate_every, or 0"))
        if not config.init_from:
            try:
                hf.architecture(config.model)
            except HuggingFaceError as error:
                found.append(Problem("model", "decoder", f"cannot be written at the end of the run. {error}"))
        # The sizes of a model that is given are known once it is read: see `Start.of`.
        sizes = None if config.init_from else config.model.sizes
        return found + config.parallel.problems(world_size, self.global_batch, sizes, compile=self.compile)

    def _fp8_problems(self, layout: Layout, dry_run: bool) -> list[Problem]:
        found = []
        # A dry run judges the configuration: the machine that it is meant for is elsewhere.
        if not dry_run and not (torch.cuda.is_available() and has_fp8(torch.device("cuda"))):
            found.append(Problem("stage.precision", "fp8", NO_FP8, here=True))
        if layout.tp > 1:
            found.append(Problem("parallel.tp", layout.tp, "with stage.precision=fp8 use 1, and dp_shard instead"))
        if layout.pp > 1 and layout.schedule in DEFERRING_SCHEDULES:
            fix = "computes linear layers itself, in no 8 bits: with stage.precision=fp8 use interleaved_1f1b"
            found.append(Problem("parallel.schedule", layout.schedule, fix))
        return found

    def run(self, config: "RunConfig", resolved: dict[str, Any]) -> int:
        """Train, or go on with training, until the artifact is there.

        Returns:
            DONE, or STOPPED_EARLY after a stop signal.

        Raises:
            LiveRunError: another process writes run_dir.
            OccupiedError: run_dir holds a run of another configuration or of other inputs.
            FaultError: see `guard`.
            CheckpointError: a checkpoint cannot be written or read.
            PreflightError: a machine or an input is not fit for the run.
            DisagreementError: the ranks were not started alike.
            RendezvousError, PeerError, BrokenError, PeerFailedError: see `parallel.distributed.joined`.
        """
        rebuilds = config.failures.rebuilds if not torch.cuda.is_available() else 0
        with StopSignals() as signals:
            for number in range(1, rebuilds + 1):
                try:
                    return self._run(config, resolved, signals)
                except BrokenError as error:
                    print(f"{error} Back to the newest checkpoint, rebuild {number} of {rebuilds}.", flush=True)
                gc.collect()
            return self._run(config, resolved, signals)

    def _run(self, config: "RunConfig", resolved: dict[str, Any], signals: StopSignals) -> int:
        with ExitStack() as stack:
            ledger = stack.enter_context(Ledger())  # sees how all that follows ends
            if self.deterministic:
                determinism.enforce()
            world = stack.enter_context(distributed.joined(**config.failures.limits))
            ledger.clock = Clock(world.device, age_s=age_s())
            resolved = with_options(config, resolved)
            check_agreement(resolved)
            directory = Path(config.run_dir)
            lease = None
            with together():
                if world.rank == 0:
                    lease = stack.enter_context(locked(directory, config.failures.lease_s))
            distributed.keep_stacks(directory / STACKS / f"{lease.number}" if lease else None)
            with together():
                start = Start.of(config)
                done = finished(directory, self.kind, recipe(resolved) | start.foreign, start.inputs)
                if done is None:
                    self._check_directory(directory, config, resolved)
                elif world.rank == 0:
                    done.verify()
            if done is not None:
                if world.rank == 0:
                    print(f"{directory} is finished ({done.id}): nothing to do", flush=True)
                return DONE
            if world.rank == 0:
                write_config(directory, resolved)
                ledger.open(directory, fingerprint(recipe(resolved) | start.foreign), world.size)
            with ledger.clock.on("preflight"):
                config.preflight.run(config, start, directory, world)
            try:
                session = Session(self, config, resolved, world, start, directory, lease, ledger, stack)
                with distributed.thrown_out():
                    return ledger.ends(session.run(signals))
            except (CheckpointError, FaultError) as error:
                if world.rank > 0:  # all ranks have the same one
                    raise SystemExit(error.exit_code) from None
                raise

    def _check_directory(self, directory: Path, config: "RunConfig", resolved: dict[str, Any]) -> None:
        check_unfinished(directory, resolved)
        found = committed.steps(directory / CHECKPOINTS)
        if not found and config.resume == "must":
            raise CheckpointError(
                f"{directory} holds no checkpoint, and resume=must. Is its file system mounted? With resume=auto a run "
                "begins where there is none."
            )
        if found and config.resume == "never":
            raise OccupiedError(
                f"{directory} holds checkpoints up to step {found[-1]}, and resume=never. Give another run_dir, or "
                "resume=auto to go on with them."
            )
        if found:
            check_same(directory, resolved)
