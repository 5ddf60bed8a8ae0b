"""The DeepSpeed engine: ZeRO 0 to 3, offload and AutoTP of the package `deepspeed` (Rasley et al. 2020) behind the
contract of `parallel.engine`.

DeepSpeed averages gradients over its data-parallel ranks and steps an optimizer over flat partitions. Losses here are
sums that are divided by the weight of the whole step, which is known after the last micro-batch only. So DeepSpeed is
told neither to scale nor to clip; a hook before the optimizer's kernel gives it the one factor that undoes the average,
divides by the weight and clips, and says whether to skip, as the native engine does.

Shape suffixes: B sequences, L tokens.
"""

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conf.errors import LongrunError, Problem
from conf.registry import register
from parallel import determinism
from parallel.distributed import World
from parallel.ema import Average
from parallel.engine import LossTerms, Outputs, Settings, StepResult, nothing
from parallel.engines.deepspeed_partitions import Partitions, Placed, placed
from parallel.gather import Gathered
from parallel.layout import Layout
from parallel.plan import Plan, chosen
from parallel.precision import compute_dtype
from parallel.random import dropout_keys
from parallel.recompute import recompute
from parallel.reduce import Sums, means
from parallel.spikes import Spikes

BUCKET = 50_000_000
"""Elements that are reduced or gathered at once."""

NATIVE = "or engine=native, which has it"


class DeepSpeedError(LongrunError):
    """DeepSpeed is missing, or cannot run what it was given."""


@register("engine", "deepspeed")
@dataclass(frozen=True)
class DeepSpeed:
    """The package deepspeed: ZeRO 0 to 3, offload to host memory, and AutoTP for tensor parallelism.

    Args:
        ema_debias: the average of the weights forgets the initial ones (as Adam's moments do); else it starts at them.
    """

    ema_debias: bool = True

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        """What DeepSpeed cannot do, or does otherwise than the native engine."""
        found = [Problem(f"parallel.{key}", value, fix) for key, value, fix in _layout_problems(config.parallel)]
        if importlib.util.find_spec("deepspeed") is None and not config.dry_run:
            found.append(Problem("engine", "deepspeed", _MISSING))
        if type(config.optim).__name__ != "AdamW":
            name = type(config.optim).__name__.lower()
            found.append(Problem("optim", name, f"engine=deepspeed runs optim=adamw only: use that, {NATIVE}"))
        kv_heads = getattr(config.model, "kv_heads", 0)
        if not config.init_from and kv_heads % config.parallel.tp:
            found.append(Problem("parallel.tp", config.parallel.tp, _heads(kv_heads, config.parallel.tp)))
        if not config.init_from and getattr(config.model, "moe", None) and config.model.moe.experts:
            found.append(Problem("model.moe.experts", config.model.moe.experts, _NO_EXPERTS))
        precision = getattr(config.stage, "precision", "")  # some stages compute nothing
        if precision == "fp8":
            found.append(Problem("stage.precision", "fp8", f"use bf16 or fp32, {NATIVE}"))
        if precision == "bf16" and config.parallel.zero == 0:
            found.append(Problem("stage.precision", "bf16", _NO_BF16))
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
    ) -> "DeepSpeedEngine":
        """Hand the model to DeepSpeed; arguments as in the native engine's `build`. A model on the meta device is
        filled whole on every rank before DeepSpeed shares it: with ZeRO 3 in host memory.

        Raises:
            DeepSpeedError: the package is missing, or it cannot run this.
        """
        deepspeed = _package()
        problems = _layout_problems(layout)
        if problems:
            raise DeepSpeedError("; ".join(f"parallel.{key}={value}: {fix}" for key, value, fix in problems))
        compute = compute_dtype(settings.precision, world.device)
        if compute == torch.bfloat16 and layout.zero == 0:
            raise DeepSpeedError(f"precision={settings.precision}: {_NO_BF16}.")
        if any(hasattr(module, "settle") for module in model.modules()):
            raise DeepSpeedError(f"a mixture of experts: {_NO_EXPERTS}.")
        if settings.deterministic:
            determinism.enforce()
        if any(p.is_meta for p in model.parameters()):
            if initialise is None:
                raise DeepSpeedError("the model is on the meta device: pass initialise=, which fills its parameters.")
            model.to_empty(device="cpu" if layout.zero == 3 else world.device)
            initialise(model)
        blocks: Any = model.blocks
        recompute(list(blocks), layout.recompute)
        if settings.compile:
            for block in blocks:
                block.compile()
        made = optimizer(model)
        if not isinstance(made, torch.optim.AdamW) or not getattr(made, "_step_supports_amp_scaling", False):
            raise DeepSpeedError(f"{type(made).__name__}: engine=deepspeed runs AdamW(fused=True) only.")
        # DeepSpeed rounds the parameters before it copies them to its fp32 masters.
        masters = {name: p.detach() for name, p in model.named_parameters()}
        plan = getattr(model, "plan", None)
        config = _configuration(layout, compute, _autotp(model, plan, layout.tp) if layout.tp > 1 and plan else {})
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        whole = {name: p.shape for name, p in masters.items()}
        if layout.zero == 3 and hasattr(model, "head"):
            deepspeed.zero.register_external_parameter(model, model.head)  # the model reads it outside of its module
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=made, config=config, dist_init_required=False)
        where = placed(wrapped, dict(model.named_parameters()), whole, layout.zero, layout.tp)
        if compute != torch.float32:
            where.put_masters(masters)
        return DeepSpeedEngine(wrapped, made, where, layout, world, settings, self.ema_debias)


_MISSING = "the package is not installed: pip install 'longrun[deepspeed]'"
_NO_EXPERTS = f"experts keep count of the step, which engine=deepspeed does not: use 0, {NATIVE}"
_NO_BF16 = f"DeepSpeed's bf16 without ZeRO drifts: use fp32, parallel.zero=1 or more, {NATIVE}"


def _package() -> Any:
    """The package, quiet, and without the collectives in shared memory that it would compile for a minute."""
    if importlib.util.find_spec("deepspeed") is None:
        raise DeepSpeedError(f"engine=deepspeed: {_MISSING}")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups, logger

    logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups._release_process_group_references()  # those of an earlier engine of this process
    return deepspeed


def _layout_problems(layout: Layout) -> list[tuple[str, object, str]]:
    """(key, value, fix) of everything in a layout that DeepSpeed cannot do."""
    found: list[tuple[str, object, str]] = []
    names = {"pp": "pipeline", "cp": "context", "ep": "expert"}
    for key, name in names.items():
        if getattr(layout, key) > 1:
            found.append(
                (key, getattr(layout, key), f"engine=deepspeed has no {name} parallelism here: use 1, {NATIVE}")
            )
    if layout.virtual_stages > 1:
        found.append(("virtual_stages", layout.virtual_stages, f"use 1, {NATIVE}"))
    if layout.zero and layout.dp_replicate > 1:
        fix = (
            f"DeepSpeed's ZeRO shares among all data-parallel ranks: use dp_shard={layout.dp} dp_replicate=1, {NATIVE}"
        )
        found.append(("dp_replicate", layout.dp_replicate, fix))
    if layout.offload != "none" and layout.zero == 0:
        found.append(("offload", layout.offload, "needs parallel.zero=1 or more"))
    elif layout.offload == "parameters" and layout.zero != 3:
        found.append(("offload", layout.offload, "needs parallel.zero=3; offload=optimizer does with 1 or 2"))
    found += [(key, True, f"use false, {NATIVE}") for key in ("async_tp", "ring") if getattr(layout, key)]
    return found


def _configuration(layout: Layout, compute: torch.dtype, tensor_parallel: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own."""
    zero: dict[str, Any] = {
        "stage": layout.zero,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 0,  # every parameter is shared, as the table of ZeRO stages says
    }
    if layout.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if layout.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # it counts samples with it
        "gradient_accumulation_steps": layout.micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": compute == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        **({"tensor_parallel": tensor_parallel} if tensor_parallel else {}),
    }


def _autotp(model: nn.Module, plan: Plan, tp: int) -> dict[str, Any]:
    """The model's plan as AutoTP's. What AutoTP is not told of stays whole on every rank; gradients of parameters
    inside a region that are not shared are of this rank's heads only, and are added up."""
    column = [name for name, _ in chosen(model, plan.column)]
    row = [name for name, _ in chosen(model, plan.row)]
    for name, module in chosen(model, plan.column):
        assert isinstance(module, nn.Linear)
        if module.out_features % tp:
            raise DeepSpeedError(f"parallel.tp={tp} must divide the {module.out_features} features of {name}.")
    if plan.groups % tp:
        raise DeepSpeedError(f"parallel.tp={tp}: {_heads(plan.groups, tp)}.")
    inside = [
        f"{region}.{name}"
        for region, module in chosen(model, plan.regions)
        for name, _ in module.named_parameters()
        if f"{region}.{name}".rpartition(".")[0] not in {*column, *row}
    ]
    specs: list[dict[str, Any]] = [
        {"patterns": _exactly(f"{name}.weight" for name in column), "partition_type": "column"},
        {"patterns": _exactly(f"{name}.weight" for name in row), "partition_type": "row"},
    ]
    if inside:
        specs.append({"patterns": _exactly(inside), "partition_type": "skip", "grad_allreduce": True})
    return {"autotp_size": tp, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def _exactly(names: Iterable[str]) -> list[str]:
    """Patterns that match these names and no other."""
    return [f"^{re.escape(name)}$" for name in names]


def _heads(kv_heads: int, tp: int) -> str:
    fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    return f"AutoTP shares whole key/value heads, of which there are {kv_heads}: use tp in {fitting}, {NATIVE}"


class DeepSpeedEngine:
    """See `parallel.engine.Engine`. `state()` copies what DeepSpeed's flat partitions hold, and `loaded()` copies it
    back.

    Attributes:
        device: where this rank computes.
        dp_rank, dp_size: which part of each global batch is this rank's.
    """

    def __init__(
        self,
        wrapped: Any,
        optimizer: Optimizer,
        where: Placed,
        layout: Layout,
        world: World,
        settings: Settings,
        ema_debias: bool,
    ):
        self.device = world.device
        self.before_update: Callable[[], None] = nothing
        self.dp_rank, self.dp_size = world.rank // layout.tp, layout.dp
        self.wrapped = wrapped
        self.optimizer = optimizer
        self.where = where
        self.partitions: Partitions = where.partitions
        self.settings = settings
        self.counts = world.rank % layout.tp == 0  # tensor-parallel ranks have the same data
        self.steps = torch.zeros((), dtype=torch.int64)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        for flat in where.flats:
            optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        averaged = {str(number): flat for number, flat in enumerate(where.flats)}
        self.ema = Average(averaged, settings.ema, ema_debias) if settings.ema else None
        self.spikes = Spikes(settings.skip_spikes, settings.spike_window, self.device)
        self._given: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._norm = torch.full((), torch.inf, device=self.device)
        self._skipped: Tensor | None = None
        optimizer.register_step_pre_hook(self._scale)

    def train_step(self, micro_batches: Sequence[Any], objective: Any, learning_rate_factor: float) -> StepResult:
        """Forward, backward, clip, update; see `Engine.train_step`."""
        self._given = {}
        self.wrapped.train()
        sums = Sums(self.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.wrapped.set_gradient_accumulation_boundary(number == len(micro_batches))
            terms = self._terms(micro_batch, objective, training=True)
            self.wrapped.backward(terms.total, scale_wrt_gas=False)
            sums.add(terms, self.counts)
        self._totals = sums.over_ranks()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor
        self._norm, self._skipped = torch.full_like(self._norm, torch.inf), None
        self.before_update()
        self.wrapped.step()
        # DeepSpeed itself leaves out an update whose gradients are not finite, before it comes to the optimizer.
        skipped = torch.ones_like(self._norm) if self._skipped is None else self._skipped
        if self.ema:
            self.ema.update(skipped.to(self.where.flats[0].device))
        self.steps += 1
        loss, metrics = means(self._totals)
        return StepResult(loss, self._totals["weight"], self._norm, skipped, metrics)

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        """Before the kernel runs over one partition: what to divide gradients by, and whether to skip."""
        if self._skipped is None:
            weight = self._totals["weight"]
            loss, _metrics = means(self._totals)
            self._norm = (self.where.norm().to(self.device) * self.dp_size / weight).float()
            self._skipped = self.spikes.judge(loss, self._norm)
            clip = self.settings.clip
            share = (clip / (self._norm + 1e-6)).clamp(max=1) if clip else torch.ones_like(self._norm)
            self._divisor = (weight / self.dp_size).float() / share
        device = self.where.flats[0].device
        optimizer.grad_scale = self._divisor.to(device)  # type: ignore[attr-defined]
        optimizer.found_inf = self._skipped.to(device)  # type: ignore[attr-defined]

    def _terms(self, micro_batch: Any, objective: Any, training: bool) -> LossTerms:
        micro_batch = micro_batch.to(self.device)
        keys_B = dropout_keys(self.settings.seed, int(self.steps), micro_batch.samples_B) if training else None
        logprobs_BL = self.wrapped(
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
                sums.add(self._terms(micro_batch, objective, training=False), self.counts)
        totals = sums.over_ranks()
        loss, metrics = means(totals)
        return StepResult(loss, totals["weight"], torch.full_like(loss, torch.nan), torch.zeros_like(loss), metrics)

    @torch.no_grad()
    def logprobs(self, micro_batch: Any) -> Tensor:
        """logprobs_BL of this rank's micro-batch, causal, without gradients or dropout."""
        micro_batch = micro_batch.to(self.device)
        with self._inference(ema=False):
            return self.wrapped(
                micro_batch.tokens_BL, micro_batch.positions_BL, micro_batch.documents_BL, micro_batch.labels_BL
            )

    @contextmanager
    def _inference(self, ema: bool) -> Iterator[None]:
        average = self._average() if ema else None
        self.wrapped.eval()
        if average:
            average.swap()
            self.where.changed()
        try:
            yield
        finally:
            if average:
                average.swap()
                self.where.changed()

    def _average(self) -> Average:
        if self.ema is None:
            raise DeepSpeedError("ema=True, but the engine keeps no average: set stage.ema to a decay such as 0.999.")
        return self.ema

    def _vectors(self) -> dict[str, list[Tensor]]:
        """All that is kept per element of the parameters: kind -> flat partitions."""
        states = [self.optimizer.state[flat] for flat in self.where.flats]
        vectors = {"model.{}": list(self.where.flats)}
        for moment in ("exp_avg", "exp_avg_sq"):
            vectors["optimizer.{}." + moment] = [state[moment] for state in states]
        if self.ema:
            vectors["ema.{}"] = list(self.ema.tensors.values())
        return vectors

    def state(self) -> dict[str, Tensor]:
        """Copies, by rows; see `Engine.state`. With ZeRO 0 the live tensors."""
        state: dict[str, Tensor] = {}
        for kind, flats in self._vectors().items():
            state |= {kind.format(name): self.partitions.tensor(name, flats) for name in self.partitions.fragments}
        for name, fragment in self.partitions.fragments.items():
            state[f"optimizer.{name}.step"] = self.optimizer.state[self.where.flats[fragment.flat]]["step"].clone()
        self._given = state
        if self.ema:
            state = state | {"engine.ema_updates": self.ema.updates}
        return state | {"engine.steps": self.steps} | self.spikes.state()

    @torch.no_grad()
    def loaded(self) -> None:
        """Take over what was written into the last `state()`."""
        for kind, flats in self._vectors().items():
            for name in self.partitions.fragments:
                self.partitions.put(name, self._given[kind.format(name)], flats)
        for name, fragment in self.partitions.fragments.items():
            step = self.optimizer.state[self.where.flats[fragment.flat]]["step"]
            step.copy_(self._given[f"optimizer.{name}.step"])
        self._given = {}
        self.where.changed()

    @torch.no_grad()
    def tensors(self, ema: bool = False) -> dict[str, Tensor]:
        """This rank's rows of the fp32 weights: copies, but with ZeRO 0 live; see `Engine.tensors`."""
        flats = list(self._average().tensors.values()) if ema else self.where.flats
        return {name: self.partitions.tensor(name, flats) for name in self.partitions.fragments}

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Full fp32 weights on the CPU of rank 0. The others help to gather, one tensor at a time, and keep nothing."""
        gathered = Gathered(self.tensors(ema))
        found = {name: gathered.whole(name) for name in gathered.meta}
        return {name: tensor for name, tensor in found.items() if tensor is not None}
