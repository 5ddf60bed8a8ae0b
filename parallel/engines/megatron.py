"""The Megatron engine: Megatron-Core's tensor, sequence and pipeline parallelism, its data parallelism and its
distributed optimizer, behind the same contract as `engine=native`.

Same configuration, objectives, micro-batches and checkpoints, so that a run may stop on one engine and go on with the
other. Gradients are of sums here, too: Megatron adds them up over micro-batches and ranks, and the optimizer's kernel
divides once, together with clipping. The optimizer is the run's own; it updates Megatron's flat buffers.

Shape suffixes: B sequences, L tokens, l tokens of this context-parallel rank, V vocabulary rows of this rank.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from conf.errors import Problem
from conf.registry import register
from parallel import context, determinism
from parallel.distributed import World
from parallel.ema import Average
from parallel.engine import Outputs, Settings, StepResult, nothing
from parallel.engines.megatron_masters import Masters
from parallel.engines.megatron_model import (
    Sight,
    build_chunks,
    dropout_problems,
    join_groups,
    label_logprobs,
    model_problems,
    multiples_near,
)
from parallel.engines.megatron_stage import Stage
from parallel.engines.native import EngineError
from parallel.gather import Gathered
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.precision import compute_dtype
from parallel.reduce import Sums, means
from parallel.spikes import Spikes
from parallel.view import IGNORED, PADDING, view_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@register("engine", "megatron")
@dataclass(frozen=True)
class Megatron:
    """Megatron-Core: tp with sequence parallelism, pp with 1F1B and interleaved 1F1B, data parallelism (zero=0) and its
    distributed optimizer (zero=1). AdamW only. NCCL on GPUs; gloo on CPUs where `cpu` allows it.

    Args:
        cpu: run on CPUs, with stand-ins for the CUDA functions that Megatron calls: for tests and for a look.
        transformer_engine: linear layers of the package transformer-engine instead of Megatron's own (CUDA).
        ema_debias: the average of the weights forgets the initial ones (as Adam's moments do); else it starts at them.
    """

    cpu: bool = False
    transformer_engine: bool = False
    ema_debias: bool = True

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        """What this engine cannot do of a run, each by its key; Megatron is not imported."""
        if not hasattr(config.stage, "settings"):
            return []  # a stage that trains nothing has no engine
        settings: Settings = config.stage.settings(config.seed, config.guard)
        found = layout_problems(config.parallel)
        if config.init_from:  # its sizes are known once it is read: see `build`
            found += dropout_problems(config.model)
        else:
            found += model_problems(config.model, config.parallel)
        if (name := type(config.optim).__name__) != "AdamW":
            found.append(Problem("optim", name, "engine=megatron updates flat buffers, by AdamW only: optim=adamw"))
        if settings.precision == "fp8":
            found.append(Problem("stage.precision", "fp8", "engine=megatron computes in bf16 or fp32"))
        if settings.compile:
            found.append(
                Problem("stage.compile", True, "engine=megatron runs Megatron's layers as they are; use false")
            )
        if not config.dry_run:  # the machine that it is meant for is elsewhere
            found += self._machine_problems(torch.cuda.is_available())
        return found

    def _machine_problems(self, cuda: bool) -> list[Problem]:
        found = []
        if importlib.util.find_spec("megatron") is None:
            fix = "needs the package megatron-core: pip install 'longrun[megatron]'"
            found.append(Problem("engine", "megatron", fix))
        if not cuda and not self.cpu:
            fix = "there is no CUDA device: set engine.cpu=true to run Megatron on CPUs, or engine=native"
            found.append(Problem("engine.cpu", False, fix))
        if cuda and self.cpu:
            found.append(Problem("engine.cpu", True, "is for machines without a CUDA device; this one has one"))
        if self.transformer_engine and (not cuda or importlib.util.find_spec("transformer_engine") is None):
            fix = "needs a CUDA device and the package transformer-engine; use false"
            found.append(Problem("engine.transformer_engine", True, fix))
        return found

    def build(
        self,
        model: nn.Module,
        layout: Layout,
        optimizer: Callable[[nn.Module], Optimizer],
        *,
        world: World,
        settings: Settings = Settings(),
        initialise: Callable[[nn.Module], None] | None = None,
    ) -> "MegatronEngine":
        """Make Megatron's model with the configuration and the values of ours.

        Args:
            model: a `Decoder`, or what has its attributes and parameter names. Keeps this rank's parameters only.
            layout: sizes of the mesh axes.
            optimizer: given the model, makes its optimizer: one that treats each element by itself, and follows torch's
                protocol for gradients that are scaled by the step, as AdamW(fused=True) does.
            world: from `parallel.distributed.start()`.
            settings: precision, clipping, averages and so on.
            initialise: fills the parameters of a model that was built on the meta device.

        Raises:
            EngineError: what Megatron cannot do, all of it; or the package is not there.
        """
        architecture: Any = model.config
        vocabulary: Any = model.vocabulary
        if initialise is None and any(parameter.is_meta for parameter in model.parameters()):
            raise EngineError("the model is on the meta device: pass initialise=, which fills its parameters.")
        problems = [*self._machine_problems(world.device.type == "cuda"), *layout_problems(layout)]
        problems += model_problems(architecture, layout)
        if problems:
            raise EngineError("engine=megatron cannot run this:\n  " + "\n  ".join(map(str, problems)))
        if settings.deterministic:
            determinism.enforce()
        compute = compute_dtype(settings.precision, world.device)
        here: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.cpu:
            from parallel.engines.megatron_cpu import on_cpu as here
        with here():
            join_groups(layout)
            mesh = Mesh(layout, world.device)
            if layout.cp > 1:
                context.install(model, mesh.context_group, layout.ring)
            sight = Sight(model)
            modules = build_chunks(sight, vocabulary, layout, compute, self.transformer_engine)
            stage = Stage(layout, modules, architecture, vocabulary, world.device)
            stage.place(model, initialise)
            made = optimizer(model)
            masters = _onto_flat_buffers(made, model, stage, layout)
            return MegatronEngine(stage, masters, sight, made, mesh, world, settings, self.ema_debias, here)


def layout_problems(layout: Layout) -> list[Problem]:
    """Axes and switches that this engine does not have."""
    if min(layout.pp, layout.tp, layout.virtual_stages) < 1:
        return []  # the layout says so itself, and what follows divides by them
    found = []
    if layout.ep > 1:
        found.append(
            Problem("parallel.ep", layout.ep, "engine=megatron has dense decoders only; use 1, or engine=native")
        )
    if layout.zero > 1:
        fix = "engine=megatron shares nothing (0) or optimizer states (1: its distributed optimizer)"
        found.append(Problem("parallel.zero", layout.zero, fix))
    if layout.zero == 1 and layout.dp_replicate > 1:
        fix = f"the distributed optimizer shares among all: use dp_replicate=1 dp_shard={layout.dp}"
        found.append(Problem("parallel.dp_replicate", layout.dp_replicate, fix))
    schedule = "interleaved_1f1b" if layout.virtual_stages > 1 else "1f1b"
    if layout.pp > 1 and layout.schedule != schedule:
        fix = f"with virtual_stages={layout.virtual_stages}, engine=megatron has {schedule} only"
        found.append(Problem("parallel.schedule", layout.schedule, fix))
    if layout.virtual_stages > 1 and layout.micro_batches % layout.pp:
        nearest = multiples_near(layout.micro_batches, layout.pp)
        fix = f"must be a multiple of pp={layout.pp} with virtual_stages > 1; nearest: {nearest}"
        found.append(Problem("parallel.micro_batches", layout.micro_batches, fix))
    if layout.offload != "none":
        found.append(Problem("parallel.offload", layout.offload, "engine=megatron offloads nothing; use none"))
    if layout.async_tp:
        found.append(Problem("parallel.async_tp", True, "is a switch of engine=native; use false"))
    return found


def _onto_flat_buffers(optimizer: Optimizer, model: nn.Module, stage: Stage, layout: Layout) -> Masters:
    """Wrap the stage's modules for data parallelism, and let an optimizer of the canonical parameters update Megatron's
    buffers instead: each by the options of the group that its canonical parameters are in."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not isinstance(optimizer, torch.optim.AdamW) or not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise EngineError(
            f"engine=megatron updates flat buffers by AdamW(fused=True), not by {type(optimizer).__name__}: "
            "use optim=adamw."
        )
    canonical = dict(model.named_parameters())
    group_of = {
        parameter: number for number, group in enumerate(optimizer.param_groups) for parameter in group["params"]
    }
    held = stage.held(copies=layout.dp * layout.cp if layout.zero == 0 else 1)
    groups = [group_of[canonical[one.pieces[0].name]] for one in held]

    def update(parameters: dict[str, Tensor]) -> None:
        for number, group in enumerate(optimizer.param_groups):
            group["params"] = [
                parameters[one.key]
                for one, of in zip(held, groups, strict=True)
                if of == number and one.key in parameters
            ]

    switches = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=layout.zero == 1)
    chunks = [
        DistributedDataParallel(module.config, switches, module, disable_bucketing=number > 0)
        for number, module in enumerate(stage.modules)
    ]
    distributed = None
    if layout.zero == 1:
        update({one.key: one.parameter for one in held})
        distributed = DistributedOptimizer(
            optimizer,
            OptimizerConfig(bf16=chunks[0].config.bf16, use_distributed_optimizer=True),
            grad_scaler=None,
            init_state_fn=None,
            model_chunks=chunks,
            per_model_buffers={number: chunk.buffers for number, chunk in enumerate(chunks)},
            data_parallel_group=stage.mesh["dp"].get_group(),
            data_parallel_group_gloo=None,
            data_parallel_group_idx=0,
            distributed_optimizer_instance_id=0,
        )
    shapes = {name: parameter.shape for name, parameter in canonical.items()}
    masters = Masters(chunks, held, shapes, stage.mesh, distributed)
    update(masters.flat)
    masters.take_apart({name: parameter.detach() for name, parameter in canonical.items()}, masters.flat)
    masters.publish()
    return masters


class MegatronEngine:
    """See `parallel.engine.Engine`.

    Attributes:
        device: where this rank computes.
        dp_rank, dp_size: which part of each global batch is this rank's.
    """

    def __init__(
        self,
        stage: Stage,
        masters: Masters,
        sight: Sight,
        optimizer: Optimizer,
        mesh: Mesh,
        world: World,
        settings: Settings,
        ema_debias: bool,
        here: Callable[[], AbstractContextManager[None]],
    ):
        from megatron.core.distributed import finalize_model_grads

        self.device, self.rank = world.device, world.rank
        self.before_update: Callable[[], None] = nothing
        self.dp_rank, self.dp_size = mesh.dp_rank, mesh.layout.dp
        self.stage, self.masters, self.sight, self.optimizer = stage, masters, sight, optimizer
        self.mesh, self.layout, self.settings, self.here = mesh, mesh.layout, settings, here
        config = stage.modules[0].config
        # Without its number of tokens, by which it would divide: the engine divides by the step's weight.
        config.finalize_model_grads_func = lambda chunks, tokens, **groups: finalize_model_grads(chunks, None, **groups)
        waits = [chunk.no_sync for chunk in masters.chunks]
        config.no_sync_func = waits if len(waits) > 1 else waits[0]
        self.steps = torch.zeros((), dtype=torch.int64)  # on the CPU: reading it waits for nobody
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.spikes = Spikes(settings.skip_spikes, settings.spike_window, self.device)
        self._make_moments()
        self.ema = Average(masters.flat, settings.ema, ema_debias) if settings.ema else None
        self._canonical: dict[str, Any] = {}

    def _make_moments(self) -> None:
        """A first, skipped update: moments exist from here on, and everything is as it was."""
        self.masters.take_gradients()
        one = torch.ones((), device=self.device)
        self._update(scale=one, skipped=one, factor=0.0)

    def train_step(self, micro_batches: Sequence[Any], objective: Any, learning_rate_factor: float) -> StepResult:
        """Forward, backward, clip, update; see `Engine.train_step`."""
        with self.here():
            for chunk in self.masters.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            sums = self._figures(micro_batches, objective, training=True)
            self.before_update()
            totals = sums.over_ranks(squares=_squares(self.masters.take_gradients()))
            loss, metrics = means(totals)
            norm = (totals["squares"].sqrt() / totals["weight"]).float()
            skipped = self.spikes.judge(loss, norm)
            clip = self.settings.clip
            share = (clip / (norm + 1e-6)).clamp(max=1) if clip else torch.ones_like(norm)
            self._update(scale=totals["weight"].float() / share, skipped=skipped, factor=learning_rate_factor)
            if self.ema:
                self.ema.update(skipped)
        self.steps += 1
        self._canonical = {}
        return StepResult(loss, totals["weight"], norm, skipped, metrics)

    def _update(self, scale: Tensor, skipped: Tensor, factor: float) -> None:
        """One optimizer step with gradients divided by `scale`; none where `skipped` is 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.publish()

    def _figures(self, micro_batches: Sequence[Any], objective: Any, training: bool) -> Sums:
        """Forward, and backward where training, of all micro-batches. Of the ranks of a pipeline, and of those that
        share its matrices, one counts; those of earlier stages know the names of its figures from a loss of nothing."""
        sums = Sums(self.device)
        moved = [micro_batch.to(self.device) for micro_batch in micro_batches]

        def answer(number: int, logprobs_BL: Tensor) -> Tensor:
            terms = objective.loss(Outputs(logprobs_BL), moved[number])
            sums.add(terms, counts=self.mesh.counts)
            return terms.total

        self._run(moved, objective.causal, answer, training)
        if not self.stage.last:
            for micro_batch in moved:
                unknown_BL = torch.zeros(micro_batch.labels_BL.shape, device=self.device)
                sums.add(objective.loss(Outputs(unknown_BL), micro_batch), counts=False)
        return sums

    def _run(
        self, micro_batches: Sequence[Any], causal: bool, answer: Callable[[int, Tensor], Tensor], training: bool
    ) -> None:
        """Megatron's schedule over micro-batches.

        Args:
            micro_batches: all of as many sequences; on the device.
            causal: hide later tokens.
            answer: given the number of a micro-batch and its logprobs_BL, on the last stage; returns what to
                differentiate.
            training: also backward, adding gradients up in Megatron's buffers.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        longest = max(micro_batch.tokens_BL.shape[1] for micro_batch in micro_batches)
        views = [view_of(_lengthened(batch, longest), self.layout, self.mesh, causal=causal) for batch in micro_batches]
        count = len(views)
        if self.layout.virtual_stages > 1:  # where it trains, they are as many as that already
            count = -(-count // self.layout.pp) * self.layout.pp
        self.sight.visible.clear()

        def forward(numbers: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            number = next(numbers)
            view = views[min(number, len(views) - 1)]
            seen = self.sight.see(number, view.positions_Bl, view.documents_Bl, **view.context)
            return chunk(view.tokens_Bl, view.positions_Bl, seen), partial(loss, number)

        def loss(number: int, logits_BlV: Tensor) -> tuple[Tensor, Tensor, None]:
            uncounted = torch.zeros((), dtype=torch.int, device=self.device)
            if number >= len(views):
                return logits_BlV.new_zeros(()), uncounted, None
            logprobs_Bl = label_logprobs(logits_BlV, views[number].labels_Bl, self.stage.rows)
            logprobs_BL = views[number].whole(logprobs_Bl)
            return answer(number, logprobs_BL[:, : micro_batches[number].tokens_BL.shape[1]]), uncounted, None

        chunks = list(self.masters.chunks)
        numbers = [iter(range(count)) for _ in chunks]
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=numbers if len(chunks) > 1 else numbers[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=count,
            seq_length=longest + -longest % self.layout.sequence_multiple,
            micro_batch_size=views[0].tokens_Bl.shape[0],
            forward_only=not training,
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], objective: Any, ema: bool = False) -> StepResult:
        """Means over the micro-batches of all ranks, of which each rank has the same number."""
        with self._inference(ema):
            totals = self._figures(micro_batches, objective, training=False).over_ranks()
        loss, metrics = means(totals)
        return StepResult(loss, totals["weight"], torch.full_like(loss, torch.nan), torch.zeros_like(loss), metrics)

    @torch.no_grad()
    def logprobs(self, micro_batch: Any) -> Tensor:
        """logprobs_BL of this rank's micro-batch, causal, without gradients or dropout; on every stage."""
        from megatron.core import parallel_state

        found_BL = torch.zeros(micro_batch.labels_BL.shape, device=self.device)

        def answer(number: int, logprobs_BL: Tensor) -> Tensor:
            found_BL.copy_(logprobs_BL)
            return logprobs_BL.sum()

        with self._inference(ema=False):
            self._run([micro_batch.to(self.device)], causal=True, answer=answer, training=False)
        if self.layout.pp > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(found_BL, last, group=parallel_state.get_pipeline_model_parallel_group())
        return found_BL

    @contextmanager
    def _inference(self, ema: bool) -> Iterator[None]:
        average = self._average() if ema else None
        with self.here():
            for chunk in self.masters.chunks:
                chunk.eval()
            if average:
                average.swap()
                self.masters.publish()
            try:
                yield
            finally:
                if average:
                    average.swap()
                    self.masters.publish()

    def _average(self) -> Average:
        if not self.ema:
            raise EngineError("ema=True, but the engine keeps no average: set stage.ema to a decay such as 0.999.")
        return self.ema

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Canonical tensors, put together from Megatron's buffers; what is loaded into them is taken over by `loaded`.
        `engine.steps` counts steps, `engine.ema_updates` the average's."""
        with self.here():
            self._canonical = {}
            for prefix, suffix, flat in self._kept():
                for name, tensor in self.masters.assembled(flat).items():
                    self._canonical[f"{prefix}.{name}{suffix}"] = tensor
            updates = self._updates()
        for name in self.masters.shapes:
            self._canonical[f"optimizer.{name}.step"] = updates.clone()
        average = {"engine.ema_updates": self.ema.updates} if self.ema else {}
        return {**self._canonical, **average, "engine.steps": self.steps, **self.spikes.state()}

    def _kept(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """What is in the state, under the masters' keys: prefix and suffix of canonical names, and the tensors."""
        flat = self.masters.flat
        yield "model", "", flat
        for moment in MOMENTS:
            yield "optimizer", f".{moment}", {key: self.optimizer.state[p][moment] for key, p in flat.items()}
        if self.ema:
            yield "ema", "", self.ema.tensors

    def _updates(self) -> Tensor:
        """How many updates were not skipped: the same for every parameter, also for those held elsewhere."""
        known = [self.optimizer.state[flat]["step"] for flat in self.masters.flat.values()]
        updates = known[0].clone() if known else torch.zeros((), device=self.device)
        dist.all_reduce(updates, op=dist.ReduceOp.MAX, group=self.stage.mesh["dp"].get_group())
        return updates

    def loaded(self) -> None:
        """Take over what was written into the tensors of the last `state()`."""
        with self.here():
            for prefix, suffix, flat in self._kept():
                canonical = {name: self._canonical[f"{prefix}.{name}{suffix}"] for name in self.masters.shapes}
                self.masters.take_apart(canonical, flat)
            for one in self.masters.held:
                if one.key in self.masters.flat:
                    step = self.optimizer.state[self.masters.flat[one.key]]["step"]
                    step.copy_(self._canonical[f"optimizer.{one.pieces[0].name}.step"])
            self.masters.publish()

    def tensors(self, ema: bool = False) -> dict[str, Tensor]:
        """Canonical weights of this rank's stage, put together from Megatron's buffers; see `Engine.tensors`."""
        with self.here():
            return dict(self.masters.assembled(self._average().tensors if ema else self.masters.flat))

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Full fp32 weights on the CPU of rank 0. The others help to gather, one tensor at a time, and keep nothing."""
        gathered = Gathered(self.tensors(ema))
        found = {name: gathered.whole(name) for name in gathered.meta}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def _lengthened(micro_batch: Any, length: int) -> Any:
    """A copy whose sequences end in padding: Megatron's stages pass on tensors of one size."""
    missing = length - micro_batch.tokens_BL.shape[1]
    fill = {"tokens_BL": 0, "positions_BL": 0, "documents_BL": PADDING, "labels_BL": IGNORED}
    longer = {key: F.pad(getattr(micro_batch, key), (0, missing), value=value) for key, value in fill.items()}
    return replace(micro_batch, **longer)


def _squares(gradients: list[tuple[Tensor, int]]) -> Tensor:
    """This rank's share of the squared norm, in fp64: what several ranks hold is counted once over all of them."""
    counted = [(gradient, copies) for gradient, copies in gradients if copies]
    norms = torch.stack(torch._foreach_norm([gradient for gradient, _ in counted])).double()
    return (norms.square() / norms.new_tensor([copies for _, copies in counted])).sum()
