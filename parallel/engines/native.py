"""The native engine: PyTorch's own FSDP2, DTensor and optimizers, on one process or many.

A step is the same on every layout: gradients of *sums* are added over micro-batches and ranks, and divided once, by
the weight of the whole step, together with clipping, inside the optimizer's kernel. Nothing in it waits for the device.

Shape suffixes: B sequences, L tokens.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from conf.errors import LongrunError
from conf.registry import register
from parallel.distributed import World
from parallel.ema import Average
from parallel.engine import LossTerms, Outputs, Settings, StepResult
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.precision import compute_dtype
from parallel.random import dropout_keys
from parallel.reduce import Sums, means, squared_norm
from parallel.spikes import Spikes
from parallel.whole import Whole
from parallel.zero import Sharded


class EngineError(LongrunError):
    """The engine cannot run what it was given."""


@register("engine", "native")
@dataclass(frozen=True)
class Native:
    """PyTorch alone: FSDP2 for ZeRO 0 to 3 and HSDP, gloo on CPUs, NCCL on GPUs.

    Args:
        ema_debias: the average of the weights forgets the initial ones (as Adam's moments do); else it starts at them.
    """

    ema_debias: bool = True

    def build(
        self,
        model: nn.Module,
        layout: Layout,
        optimizer: Callable[[nn.Module], Optimizer],
        *,
        world: World,
        settings: Settings = Settings(),
        initialise: Callable[[nn.Module], None] | None = None,
    ) -> "NativeEngine":
        """Place the model on the ranks and make its optimizer.

        Args:
            model: has `blocks`, the parts that are sharded and compiled one by one; forward as `Decoder`'s. Changed in
                place. On the meta device it is given storage here, shard by shard, and `initialise` fills it.
            layout: sizes of the mesh axes.
            optimizer: given the placed model, makes its optimizer, which follows torch's protocol for gradients that
                are scaled by the step (attributes `grad_scale` and `found_inf`), as AdamW(fused=True) does.
            world: from `parallel.distributed.start()`.
            settings: precision, clipping, averages and so on.
            initialise: fills the parameters of a model that was built on the meta device.

        Raises:
            EngineError: the optimizer does not follow the protocol, or a model on the meta device has no `initialise`.
        """
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise EngineError(f"{type(model).__name__} has no ModuleList `blocks`, the parts to shard one by one.")
        on_meta = any(p.is_meta for p in model.parameters())
        if on_meta and initialise is None:
            raise EngineError("the model is on the meta device: pass initialise=, which fills its parameters.")
        if not on_meta:
            model.to(world.device)
        if settings.compile:
            for block in blocks:
                block.compile()
        compute = compute_dtype(settings.precision, world.device)
        placed: Sharded | Whole | None = None
        if layout.dp > 1:
            placed = Sharded(model, blocks, Mesh(layout, world.device).data, layout.zero, compute)
        if on_meta and initialise is not None:
            model.to_empty(device=world.device)
            initialise(model)
        made = optimizer(model)  # before Whole, whose copies are nothing to optimise
        return NativeEngine(placed or Whole(model, compute), layout, made, world, settings, self.ema_debias)


class NativeEngine:
    """See `parallel.engine.Engine`.

    Attributes:
        device: where this rank computes.
        dp_rank, dp_size: which part of each global batch is this rank's.
    """

    def __init__(
        self,
        placed: Sharded | Whole,
        layout: Layout,
        optimizer: Optimizer,
        world: World,
        settings: Settings,
        ema_debias: bool,
    ):
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise EngineError(
                f"{type(optimizer).__name__} does not take grad_scale and found_inf, which scale and skip an update on "
                "the device: use a fused optimizer of torch (AdamW(fused=True)), or give yours these two attributes."
            )
        self.device = world.device
        self.dp_rank, self.dp_size = world.rank, layout.dp
        self.model = placed.model
        self.placed = placed
        self.optimizer = optimizer
        self.settings = settings
        self.replicas = layout.dp if layout.zero == 0 else layout.dp_replicate
        self.rank = world.rank
        self.parameters = placed.parameters
        self.spikes = Spikes(settings.skip_spikes, settings.spike_window, self.device)
        self.steps = torch.zeros((), dtype=torch.int64)  # on the CPU: reading it waits for nobody
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self._make_moments()
        self.ema = Average(self.parameters, settings.ema, ema_debias) if settings.ema else None

    def _make_moments(self) -> None:
        """A first, skipped update: moments exist from here on, and everything is as it was."""
        for parameter in self.parameters.values():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self._update(scale=torch.ones((), device=self.device), skipped=torch.ones((), device=self.device), factor=0.0)

    def train_step(self, micro_batches: Sequence[Any], objective: Any, learning_rate_factor: float) -> StepResult:
        """Forward, backward, clip, update; see `Engine.train_step`."""
        self.model.train()
        sums = Sums(self.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.placed.accumulate(last=number == len(micro_batches))
            terms = self._terms(micro_batch, objective, training=True)
            terms.total.backward()
            sums.add(terms)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        # Replicas hold the same shards, so each contributes its part of the sum only.
        totals = sums.over_ranks(squares=squared_norm(gradients) / self.replicas)
        loss, metrics = means(totals)
        norm = (totals["squares"].sqrt() / totals["weight"]).float()
        skipped = self.spikes.judge(loss, norm)
        share = (self.settings.clip / (norm + 1e-6)).clamp(max=1) if self.settings.clip else torch.ones_like(norm)
        self._update(scale=totals["weight"].float() / share, skipped=skipped, factor=learning_rate_factor)
        if self.ema:
            self.ema.update(skipped)
        self.steps += 1
        return StepResult(loss, totals["weight"], norm, skipped, metrics)

    def _update(self, scale: Tensor, skipped: Tensor, factor: float) -> None:
        """One optimizer step with gradients divided by `scale`; none where `skipped` is 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.placed.changed()

    def _terms(self, micro_batch: Any, objective: Any, training: bool) -> LossTerms:
        micro_batch = micro_batch.to(self.device)
        keys_B = dropout_keys(self.settings.seed, int(self.steps), micro_batch.samples_B) if training else None
        logprobs_BL = self.model(
            micro_batch.tokens_BL,
            micro_batch.positions_BL,
            micro_batch.documents_BL,
            micro_batch.labels_BL,
            causal=objective.causal,
            dropout_keys_B=keys_B,
        )
        return objective.loss(Outputs(logprobs_BL), micro_batch)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], objective: Any, ema: bool = False) -> StepResult:
        """Means over the micro-batches of all ranks, of which each rank has the same number."""
        sums = Sums(self.device)
        with self._inference(ema):
            for micro_batch in micro_batches:
                sums.add(self._terms(micro_batch, objective, training=False))
        totals = sums.over_ranks()
        loss, metrics = means(totals)
        return StepResult(loss, totals["weight"], torch.full_like(loss, torch.nan), torch.zeros_like(loss), metrics)

    @torch.no_grad()
    def logprobs(self, micro_batch: Any) -> Tensor:
        """logprobs_BL of this rank's micro-batch, causal, without gradients or dropout."""
        micro_batch = micro_batch.to(self.device)
        with self._inference(ema=False):
            return self.model(
                micro_batch.tokens_BL, micro_batch.positions_BL, micro_batch.documents_BL, micro_batch.labels_BL
            )

    @contextmanager
    def _inference(self, ema: bool) -> Iterator[None]:
        if ema and not self.ema:
            raise EngineError("ema=True, but the engine keeps no average: set stage.ema to a decay such as 0.999.")
        average = self.ema if ema else None
        self.model.eval()
        if average:
            average.swap()
            self.placed.changed()
        try:
            yield
        finally:
            self.placed.release()
            if average:
                average.swap()
                self.placed.changed()

    def state(self) -> dict[str, Tensor]:
        """The live tensors; see `Engine.state`. `engine.steps` counts steps, `engine.ema_updates` the average's."""
        state: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{moment}"] = value
        if self.ema:
            state |= self.ema.state()
        return state | {"engine.steps": self.steps} | self.spikes.state()

    def loaded(self) -> None:
        """What was gathered before is stale."""
        self.placed.changed()

    @torch.no_grad()
    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Full fp32 weights on the CPU of rank 0. The others help to gather, one tensor at a time, and keep nothing."""
        if ema and not self.ema:
            raise EngineError("ema=True, but the engine keeps no average: set stage.ema to a decay such as 0.999.")
        full = {}
        for name, tensor in (self.ema.tensors if ema and self.ema else self.parameters).items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                full[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return full
