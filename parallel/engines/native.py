"""The native engine: PyTorch's own FSDP2, DTensor and optimizers, on one process or many.

A step is the same on every layout: gradients of *sums* are added over micro-batches and ranks, and divided once, by
the weight of the whole step, together with clipping, inside the optimizer's kernel. Nothing in it waits for the device.

Shape suffixes: B sequences, L tokens, l tokens of this rank, N features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from conf.errors import LongrunError
from conf.registry import register
from parallel import determinism
from parallel.checksums import Checksums
from parallel.decode import Decoding
from parallel.distributed import World
from parallel.ema import Average
from parallel.engine import Outputs, Settings, StepResult, nothing
from parallel.gather import Gathered
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.offload import Offloaded
from parallel.pipeline import Part, Pipeline
from parallel.place import Placement
from parallel.precision import compute_dtype
from parallel.random import dropout_keys
from parallel.reduce import Sums, means, squared_norm
from parallel.spikes import Spikes
from parallel.statistics import Statistics
from parallel.view import View, view_of


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
    repeats: ClassVar[bool] = True

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
                place. On the meta device it is given storage here, shard by shard, and `initialise` fills it. Beyond
                data parallelism it declares its `plan`, and can be cut by `part`.
            layout: sizes of the mesh axes.
            optimizer: given the placed model, makes its optimizer, which follows torch's protocol for gradients that
                are scaled by the step (attributes `grad_scale` and `found_inf`), as AdamW(fused=True) does.
            world: from `parallel.distributed.start()`.
            settings: precision, clipping, averages and so on.
            initialise: fills the parameters of a model that was built on the meta device, or of a part of it.

        Raises:
            EngineError: the optimizer does not follow the protocol, or a model on the meta device has no `initialise`.
        """
        if settings.deterministic:
            determinism.enforce()
        if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
            raise EngineError(f"{type(model).__name__} has no ModuleList `blocks`, the parts to shard one by one.")
        if initialise is None and any(p.is_meta for p in model.parameters()):
            raise EngineError("the model is on the meta device: pass initialise=, which fills its parameters.")
        mesh = Mesh(layout, world.device)
        compute = compute_dtype(settings.precision, world.device)
        placement = Placement(model, layout, mesh, world.device, compute, settings, initialise, optimizer)
        return NativeEngine(model, placement, mesh, world, compute, settings, self.ema_debias)


class NativeEngine:
    """See `parallel.engine.Engine`.

    Attributes:
        device: where this rank computes.
        dp_rank, dp_size: which part of each global batch is this rank's.
        model: as it was given; placed itself, where it is not cut into stages.
        parts: the pipeline stages of this rank.
        parameters: of all parts, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        mesh: Mesh,
        world: World,
        compute: torch.dtype,
        settings: Settings,
        ema_debias: bool,
    ):
        layout, optimizer = placement.layout, placement.optimizer
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise EngineError(
                f"{type(optimizer).__name__} does not take grad_scale and found_inf, which scale and skip an update on "
                "the device: use a fused optimizer of torch (AdamW(fused=True)), or give yours these two attributes."
            )
        self.device = world.device
        self.before_update: Callable[[], None] = nothing
        self.dp_rank, self.dp_size = mesh.dp_rank, layout.dp
        self.placement = placement
        self.parts = placement.parts
        self.parameters = placement.parameters
        self.optimizer = optimizer
        self.settings = settings
        self.model = model
        self.layout, self.mesh = layout, mesh
        self.compute = compute
        self.pipeline = Pipeline(self.parts, layout, mesh.axes["pp"].get_group(), world.device)
        self._metrics: dict[type, list[str]] = {}
        self.statistics = Statistics([part.model for part in self.parts], mesh)
        self.spikes = Spikes(settings.skip_spikes, settings.spike_window, self.device)
        self.checksums = Checksums(self.device)
        self.steps = torch.zeros((), dtype=torch.int64)  # on the CPU: reading it waits for nobody
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        offloads = layout.offload == "optimizer"
        self._step = Offloaded(optimizer, self._trained()).step if offloads else optimizer.step
        self._make_moments()
        self.ema = Average(self.parameters, settings.ema, ema_debias) if settings.ema else None

    def _make_moments(self) -> None:
        """A first, skipped update: moments exist from here on, and everything is as it was."""
        for parameter in self._trained():
            parameter.grad = torch.zeros_like(parameter)
        self._update(scale=torch.ones((), device=self.device), skipped=torch.ones((), device=self.device), factor=0.0)

    def _trained(self) -> Iterator[Tensor]:
        """The parameters of the optimizer."""
        return (p for part in self.parts for p in part.placed.parameters.values() if p.requires_grad)

    def train_step(self, micro_batches: Sequence[Any], objective: Any, learning_rate_factor: float) -> StepResult:
        """Forward, backward, clip, update; see `Engine.train_step`."""
        for part in self.parts:
            part.model.train()
        sums = self._gradients(micro_batches, objective)
        every = self.settings.repeat_every
        repeated = {"differing": self._differing(sums, micro_batches, objective)} if self._due(every) else {}
        self.before_update()
        totals = self._totals(sums, objective, squares=self._squares(), **repeated)
        loss, metrics = means(totals)
        norm = (totals["squares"].sqrt() / totals["weight"]).float()
        if repeated:
            metrics["differing"] = totals["differing"].float()
            norm = norm.where(totals["differing"] == 0, torch.nan)
        skipped = self.spikes.judge(loss, norm)
        clip = self.settings.clip
        share = (clip / (norm + 1e-6)).clamp(max=1) if clip else torch.ones_like(norm)
        self._update(scale=totals["weight"].float() / share, skipped=skipped, factor=learning_rate_factor)
        if self.ema:
            self.ema.update(skipped)
        self.steps += 1
        return StepResult(loss, totals["weight"], norm, skipped, metrics | self.statistics.settle(1 - skipped))

    def _gradients(self, micro_batches: Sequence[Any], objective: Any) -> Sums:
        """Forward and backward, until the gradients are whole; the sums of what this rank answers for."""
        sums = self._pass(micro_batches, objective, training=True)
        self.placement.add_up()
        return sums

    def _due(self, every: int) -> bool:
        return every > 0 and int(self.steps) % every == 0

    def _differing(self, sums: Sums, micro_batches: Sequence[Any], objective: Any) -> Tensor:
        """Compute the gradients once more: 1 where they, or the sums, have other bits than before."""
        before_T = self._bits(sums)
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.forget()
        return (self._bits(self._gradients(micro_batches, objective)) != before_T).any().double()

    def _bits(self, sums: Sums) -> Tensor:
        gradients = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        return self.checksums.of([*gradients, *sums.terms.values()])

    def _pass(self, micro_batches: Sequence[Any], objective: Any, training: bool) -> Sums:
        """Forward, and backward where training; the sums of what this rank answers for."""
        sums = Sums(self.device)
        views = [self._view(micro_batch, objective, training) for micro_batch in micro_batches]

        def forward(part: Part, number: int, hidden_BlN: Tensor | None) -> Tensor:
            view = views[number]
            answer = view.through(part.model, hidden_BlN)
            if part.stage < self.pipeline.stages - 1:
                return answer
            terms = objective.loss(Outputs(view.whole(answer)), view.batch)
            sums.add(terms, counts=self.mesh.counts)
            return terms.total

        run = self.pipeline.train if training else self.pipeline.infer
        run(len(views), forward, lambda number: self._stream(views[number]), self.compute)
        return sums

    def _view(self, micro_batch: Any, objective: Any, training: bool) -> View:
        batch = micro_batch.to(self.device)
        context: dict[str, Any] = {}
        if training:
            context["dropout_keys_B"] = dropout_keys(self.settings.seed, int(self.steps), batch.samples_B)
            context["sequence_weights_B"] = objective.sequence_weights(batch)
        return view_of(batch, self.layout, self.mesh, causal=objective.causal, **context)

    def _stream(self, view: View) -> tuple[int, ...]:
        """Shape of the hidden states between stages."""
        sequences, tokens = view.tokens_Bl.shape
        return sequences, tokens // self.layout.tp, self.model.width  # type: ignore[return-value]

    def _totals(self, sums: Sums, objective: Any, **more: Tensor) -> dict[str, Tensor]:
        """Summed over all ranks. Only the last stage knows the objective's metrics: it tells the others, once."""
        if self.layout.pp > 1:
            kind = type(objective)
            if kind not in self._metrics:
                told = [sorted(sums.terms)]
                dist.broadcast_object_list(told, group=self.pipeline.group, group_src=self.pipeline.last)
                self._metrics[kind] = told[0]
            sums.expect(self._metrics[kind])
        return sums.over_ranks(**more)

    def _squares(self) -> Tensor:
        """This rank's share of the squared norm: what several ranks hold, each counts in part."""
        by_copies: dict[int, list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and name not in self.placement.counted_elsewhere:
                by_copies.setdefault(self.placement.copies(name), []).append(parameter.grad)
        squares = [squared_norm(gradients) / copies for copies, gradients in by_copies.items()]
        return (
            torch.stack(squares).sum().to(self.device)
            if squares
            else torch.zeros((), dtype=torch.float64, device=self.device)
        )

    def _update(self, scale: Tensor, skipped: Tensor, factor: float) -> None:
        """One optimizer step with gradients divided by `scale`; none where `skipped` is 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        home = next(self._trained()).device  # the host, where parameters are offloaded
        self.optimizer.grad_scale = scale.to(home)  # type: ignore[attr-defined]
        self.optimizer.found_inf = skipped.to(home)  # type: ignore[attr-defined]
        self._step()
        self.optimizer.zero_grad(set_to_none=True)
        self._changed()

    def _changed(self) -> None:
        for part in self.parts:
            part.placed.changed()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], objective: Any, ema: bool = False) -> StepResult:
        """Means over the micro-batches of all ranks, of which each rank has the same number."""
        with self._inference(ema):
            sums = self._pass(micro_batches, objective, training=False)
        totals = self._totals(sums, objective)
        loss, metrics = means(totals)
        return StepResult(loss, totals["weight"], torch.full_like(loss, torch.nan), torch.zeros_like(loss), metrics)

    @torch.no_grad()
    def logprobs(self, micro_batch: Any) -> Tensor:
        """logprobs_BL of this rank's micro-batch, causal, without gradients or dropout."""
        view = view_of(micro_batch.to(self.device), self.layout, self.mesh, causal=True)
        logprobs_BL = torch.zeros(micro_batch.tokens_BL.shape, device=self.device)

        def forward(part: Part, number: int, hidden_BlN: Tensor | None) -> Tensor:
            answer = view.through(part.model, hidden_BlN)
            if part.stage == self.pipeline.stages - 1:
                logprobs_BL.copy_(view.whole(answer))
            return answer

        with self._inference(ema=False):
            self.pipeline.infer(1, forward, lambda _: self._stream(view), self.compute)
        return self.pipeline.from_last(logprobs_BL)

    @contextmanager
    def decoding(self) -> Iterator[Decoding]:
        """The model, for a generator; all ranks are given the same prompts and call together."""
        with self._inference(ema=False), ExitStack() as stack:
            for shared in self.placement.tensors:
                stack.enter_context(shared.whole_sequences())
            yield Decoding(self.model, self.pipeline, self.compute)

    @contextmanager
    def _inference(self, ema: bool) -> Iterator[None]:
        average = self._average() if ema else None
        for part in self.parts:
            part.model.eval()
        if average:
            average.swap()
            self.placement.copy_twins()
            self._changed()
        try:
            yield
        finally:
            for part in self.parts:
                part.placed.release()
            if average:
                average.swap()
                self.placement.copy_twins()
                self._changed()

    def _average(self) -> Average:
        if not self.ema:
            raise EngineError("ema=True, but the engine keeps no average: set stage.ema to a decay such as 0.999.")
        return self.ema

    def state(self) -> dict[str, Tensor]:
        """The live tensors; see `Engine.state`. `engine.steps` counts steps, `engine.ema_updates` the average's."""
        tensors = self.parameters | self.placement.buffers
        state: dict[str, Tensor] = {f"model.{name}": tensor.detach() for name, tensor in tensors.items()}
        moments = getattr(self.optimizer, "moments", self.optimizer.state)  # where a state is no checkpoint's as it is
        for name, parameter in self.parameters.items():
            for moment, value in moments[parameter].items():
                state[f"optimizer.{name}.{moment}"] = value
        if self.ema:
            state |= self.ema.state()
        return state | {"engine.steps": self.steps} | self.spikes.state()

    def loaded(self) -> None:
        """What was gathered before is stale."""
        if hasattr(self.optimizer, "loaded"):
            self.optimizer.loaded()
        self.placement.copy_twins()
        self._changed()

    def tensors(self, ema: bool = False) -> dict[str, Tensor]:
        """The live weights of this rank; see `Engine.tensors`."""
        return (self._average().tensors if ema else self.parameters) | self.placement.buffers

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Full fp32 weights on the CPU of rank 0. The others help to gather, one tensor at a time, and keep nothing."""
        gathered = Gathered(self.tensors(ema))
        found = {name: gathered.whole(name) for name in gathered.meta}
        return {name: tensor for name, tensor in found.items() if tensor is not None}
