"""One process's part of a training run: from the model to the manifest."""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from conf.checkpoints import CHECKPOINTS
from conf.errors import LongrunError
from data_pipeline.artifact import Draft
from data_pipeline.lease import Lease, LiveRunError
from data_pipeline.loader import Loader
from data_pipeline.mixture import Mixture
from parallel.checksums import Replicas
from parallel.distributed import World
from parallel.precision import compute_dtype
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.committed import FencedError
from train.goodput import Ledger
from train.guard import FaultError, Patrol, StartAgainError
from train.loop import End, Loop, Validation
from train.metrics.base import Metrics, Run
from train.models import hf_weights
from train.monitor import Monitor, Rates
from train.objectives.base import MicroBatch, Samples
from train.objectives.clm import CausalLM
from train.progress import Progress
from train.rundir import check_inputs, recipe, together
from train.signals import StopSignals
from train.stages.base import DONE, STOPPED_EARLY
from train.start import Start
from train.throughput import peak_flops, peak_memory
from train.watching import Watcher

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.stages.training import Training

MODEL = "model"
SETUP = "setup"
"""What objectives keep for restarts."""

PROFILED_STEP = 3
"""After compilation and the filling of the prefetch."""


class PublishError(LongrunError):
    """The weights cannot be written."""


class Session:
    """Built in order: data, engine, objective, checkpoint. All ranks build theirs together.

    Args:
        stage: what is trained how long.
        config: the whole configuration, typed.
        resolved: the same as plain values, for records.
        world: this process among the others.
        start: tokenizer, architecture, weights.
        directory: the run directory.
        lease: rank 0's right to write it.
        ledger: accounts for the time of this process.
        stack: what is opened here is closed with it.
    """

    def __init__(
        self,
        stage: "Training",
        config: "RunConfig",
        resolved: dict[str, Any],
        world: World,
        start: Start,
        directory: Path,
        lease: Lease | None,
        ledger: Ledger,
        stack: ExitStack,
    ):
        self.stage, self.config, self.resolved = stage, config, resolved
        self.world, self.start, self.directory, self.stack = world, start, directory, stack
        self.ledger, self.clock, self.lease = ledger, ledger.clock, lease
        self.started_s = time.time()
        self.first = world.rank == 0
        with together():
            samples = start.open(config, "train")
            held_out = start.open(config, "validation")
        self.inputs = {**start.fingerprints, "samples": samples.fingerprint}
        self.checkpoints = Checkpoints(
            directory / CHECKPOINTS,
            every=stage.checkpoint_every,
            keep=stage.keep,
            keep_every=stage.keep_every,
            max_failed=config.failures.save_retries,
            fence=self._fence,
        )
        stack.callback(self.checkpoints.close)
        ledger.newest = lambda: self.checkpoints.newest
        self.engine = config.engine.build(
            start.build(),
            config.parallel,
            config.optim.build,
            world=world,
            settings=stage.settings(config.seed, config.guard),
            initialise=partial(start.fill, seed=config.seed),
        )
        # Some objectives keep what the initial weights say; a new run must not find that of an abandoned one.
        if self.first and self.checkpoints.newest is None:
            shutil.rmtree(directory / SETUP, ignore_errors=True)
        dist.barrier()
        self.samples: Samples = config.objective.setup(self.engine, samples, directory / SETUP)
        self.held_out: Samples = config.objective.setup(self.engine, held_out, directory / SETUP)
        self.progress = ledger.progress = self._resume()
        # What the loop needs, and every one that begins after going back, too.
        self.small = dist.new_group(backend="gloo")
        self.replicas = Replicas(self.engine.state(), world.device) if config.guard.every else None

    def _resume(self) -> Progress:
        """Go on from the newest checkpoint that verifies, or begin."""
        progress = self._restored()
        if progress is None:
            return Progress(inputs=self.inputs)
        self._say(f"resumed from {self.checkpoints.path(progress.step)}")
        return progress

    def _restored(self) -> Progress | None:
        """That of the newest checkpoint that verifies, whose tensors the engine has from here on."""
        state = self.checkpoints.restore(self.engine.state(), self._check)
        if state is None:
            return None
        self.engine.loaded()
        return Progress(**state)

    def _check(self, state: dict[str, Any]) -> None:
        with together():
            check_inputs(self.directory, Progress(**state).inputs, self.inputs)

    def _fence(self) -> None:
        """Before something is put in its final place.

        Raises:
            FencedError: another run has taken over the directory.
        """
        try:
            if self.lease is not None:
                self.lease.check()
        except LiveRunError as error:
            raise FencedError(str(error)) from error

    def run(self, signals: StopSignals) -> int:
        """Train, validate, write. Returns the exit code.

        Raises:
            FaultError: one that the guard does not roll back, or not again; names the last checkpoint.
            PublishError: there is no room for the model.
        """
        rates = self._rates()
        while True:
            loop = self._loop(signals, rates)
            self.clock.turn("compute")
            try:
                with self._watched(loop):
                    end = loop.run()
                break
            except FaultError as fault:
                self.clock.turn("guard")
                loop.monitor.metrics.alert("fault", str(fault))
                self.opened.close()
                self.checkpoints.wait()
                self._answer(fault)
                self.progress.seconds = loop.earlier_s  # the clock has gone on
        self.clock.turn("publish")
        with self.clock.on("checkpoint"):
            self.checkpoints.wait()
        if end == End.ASKED:
            self._say(
                f"stopped at step {self.progress.step} of {self.stage.steps} on {signals.received or 'request'} "
                "with a checkpoint; start the same command again to go on"
            )
            return STOPPED_EARLY
        if end == End.NO_GAIN:
            self._say(f"ended at step {self.progress.step}: {self.stage.patience} validations without a better loss")
        self._publish(loop, loop.validation.run(self.progress.step))
        return DONE

    def _watched(self, loop: Loop) -> AbstractContextManager:
        if not self.first:
            return nullcontext()
        return Watcher(self.config.watching, self.clock, loop.monitor.metrics, self.directory, self.world.device)

    def _answer(self, fault: FaultError) -> None:
        """Go back to before a fault, or end."""
        guard, newest = self.config.guard, self.checkpoints.newest
        if not guard.rolls_back(fault.kind):
            kept = (
                f"The last checkpoint is {self.checkpoints.path(newest)}." if newest else "There is no checkpoint yet."
            )
            raise FaultError(fault.kind, fault.step, f"{fault} {kept}")
        before, progress = self.progress.roll_backs, self._restored()
        if progress is None:
            again = "There is no checkpoint to go back to: start the same command again to train from the start."
            raise StartAgainError(fault.kind, fault.step, f"{fault} {again}")
        guard.judge_roll_back(fault, progress.step, before)
        progress.roll_backs = [*before, (fault.kind, fault.step, progress.step)]
        self._say(f"fault: {fault} Rolled back to {self.checkpoints.path(progress.step)}.")
        self.progress = self.ledger.progress = progress

    def _loop(self, signals: StopSignals, rates: Rates) -> Loop:
        stage, config, progress = self.stage, self.config, self.progress
        self.opened = self.stack.enter_context(ExitStack())  # closed when the run goes back
        run = Run(config.name, self.directory, self.resolved, stage.steps, progress.step, self.start.inputs)
        metrics = Metrics(config.logger if self.first else {}, run, config.watching.close_s)
        self.opened.callback(metrics.close, {})
        self.checkpoints.alert = metrics.alert
        if self.world.size > 1:  # alone there is nothing to communicate with
            self.clock.profiled_step = progress.step + PROFILED_STEP
            self.clock.profiled_every = config.failures.straggler_every if config.failures.straggler else 0
        monitor = Monitor(
            progress,
            metrics,
            self.clock,
            rates,
            steps=stage.steps,
            log_every=stage.log_every,
            guard=config.guard,
            copies=self.world.size // self.engine.dp_size,
            device=self.world.device,
            group=self.small,
            straggler=config.failures.straggler if self.world.size > 1 else 0.0,
            stages=config.parallel.pp,
        )
        validation = Validation(
            self.engine,
            config.objective,
            self._validation_batches(),
            progress,
            monitor,
            every=stage.validate_every,
            patience=stage.patience,
            ema=stage.ema > 0,
            bits_per_byte=self._bits_per_byte(),
        )
        return Loop(
            engine=self.engine,
            objective=config.objective,
            loader=self._loader(self.samples),
            schedule=config.schedule,
            learning_rate=config.optim.lr,
            steps=stage.steps,
            progress=progress,
            monitor=monitor,
            patrol=Patrol(self.engine, config.guard.every, self.replicas),
            checkpoints=self.checkpoints,
            validation=validation,
            clock=self.clock,
            signals=signals,
        )

    def _loader(self, samples: Samples) -> Loader:
        loader = Loader(
            samples,
            global_batch=self.stage.global_batch,
            micro_batches=self.config.parallel.micro_batches,
            dp_rank=self.engine.dp_rank,
            dp_size=self.engine.dp_size,
            seed=self.config.seed,
            prepare=self._prepare(),
            retries=self.config.failures.read_retries,
        )
        self.opened.callback(loader.close)
        return loader

    def _prepare(self) -> Callable[[MicroBatch], MicroBatch]:
        objective, seed, tokenizer = self.config.objective, self.config.seed, self.start.tokenizer
        return lambda micro_batch: objective.prepare(micro_batch, seed, tokenizer)

    def _validation_batches(self) -> list[MicroBatch]:
        """This rank's part of the first global batches of the held-out samples, none of them twice where they are
        enough for one."""
        count = max(1, min(self.stage.validation_batches, len(self.held_out) // self.stage.global_batch))
        loader = self._loader(self.held_out)
        batches = [micro_batch for number in range(count) for micro_batch in loader.batch(number)]
        loader.close()
        return batches

    def _rates(self) -> Rates:
        dtype = compute_dtype(self.stage.precision, self.world.device)
        peak = torch.tensor(peak_flops(self.world.device, dtype), dtype=torch.float64)
        dist.all_reduce(peak)
        flops = self.start.architecture.flops_per_token(self.config.data.sequence_length, self.start.vocabulary)
        return Rates(flops, float(peak))

    def _bits_per_byte(self) -> float:
        """From nats per token to bits per byte of the validation split, where the loss is over whole texts."""
        splits = [artifact.metrics.get("splits", {}).get("validation", {}) for artifact in self.start.data]
        size = sum(split.get("bytes", 0) for split in splits)
        if not isinstance(self.config.objective, CausalLM) or not size:
            return 0.0
        return float(sum(split.get("tokens", 0) for split in splits) / size / math.log(2))

    def _publish(self, loop: Loop, validation: dict[str, float]) -> None:
        """Write the weights as a Hugging Face directory, then the manifest."""
        memory = torch.tensor(peak_memory(self.world.device))
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        with together():
            self._fence()
        with together():
            try:
                weights = self.engine.tensors(ema=self.stage.ema > 0)
                hf_weights.write(self.directory / MODEL, self.start.architecture, weights, self.start.tokenizer)
            except hf_weights.UnwrittenError as error:
                raise PublishError(
                    f"{error} The checkpoint of step {self.progress.step} holds it: make room, then start the same "
                    "command again."
                ) from error
        with together():
            if self.first:
                self._fence()
                self._conclude(loop, validation, int(memory))

    def _conclude(self, loop: Loop, validation: dict[str, float], memory_bytes: int) -> None:
        account = self.ledger.account()
        summary: dict[str, Any] = {
            "steps": self.progress.step,
            "samples": self.progress.samples,
            "tokens": self.progress.tokens,
            "loss": loop.monitor.last.get("loss", math.nan),
            **validation,
            "skipped_steps": len(self.progress.skipped),
            "roll_backs": len(self.progress.roll_backs),
            **loop.monitor.summary(),
            "peak_memory_bytes": memory_bytes,
            "shares": self.clock.shares(),
            "goodput": account.goodput,
        }
        if isinstance(self.samples, Mixture):
            summary["mixture"] = self.samples.given(self.progress.samples)
        draft = Draft(
            self.directory,
            self.stage.kind,
            recipe(self.resolved) | self.start.foreign,
            self.start.inputs,
            metrics=summary,
            facts={
                "processes": self.world.size,
                "device": self.world.device.type,
                "parameters": self.start.architecture.parameter_count(self.start.vocabulary),
                "fingerprints": self.inputs,
            },
            started_s=self.started_s,
            earlier_s=loop.earlier_s,
        )
        artifact = draft.publish(f"{MODEL}/**/*")
        loop.monitor.metrics.artifact(artifact)
        loop.monitor.metrics.close({name: value for name, value in summary.items() if not isinstance(value, dict)})
        self._say(f"{_closing(artifact.path, summary)}\n{account.headline()}")

    def _say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)


def _closing(path: Path, summary: dict[str, Any]) -> str:
    shares = "  ".join(f"{name} {share:.1%}" for name, share in summary["shares"].items())
    sources = "  ".join(
        f"{name} {given['tokens']:,} tokens ({given['epochs']:.3g} epochs)"
        for name, given in summary.get("mixture", {}).items()
    )
    return (
        f"{path} is done: {summary['steps']} steps, {summary['tokens']:,} tokens, validation loss "
        f"{summary['validation_loss']:.4f}\n{summary['tokens_per_s']:,.0f} tokens/s, MFU {summary['mfu']:.1%}, "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB a process; time: {shares}"
    ) + (f"\nread: {sources}" if sources else "")
