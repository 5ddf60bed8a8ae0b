"""What a step of each layout sends, by mesh axis and collective, and what each rank holds.

Nothing is timed. The model is large enough that padding and the figures of a step are small beside it.
"""

import resource
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from conf.registry import register
from data_pipeline.batch import MicroBatch
from parallel import distributed
from parallel.engine import Settings
from parallel.engines.native import Native, NativeEngine
from parallel.layout import Layout
from parallel.reduce import local_of
from tools.parity.layouts import parse
from tools.parity.training import shares
from tools.ranks import run_ranks
from tools.traffic import Traffic
from train.models.moe import MoE
from train.models.transformer import DecoderConfig, initialise
from train.objectives.clm import CausalLM
from train.optim.adamw import AdamW

MB = 1e6


@dataclass(frozen=True)
class Held:
    """Bytes on a rank between two micro-batches of a step, when most is held for longest.

    Args:
        parameters: fp32 masters, or this rank's part of them.
        gathered: whole parameters beside them, for compute.
        gradients: of whole parameters, or parts.
        moments: of the optimizer.
    """

    parameters: int
    gathered: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.parameters + self.gathered + self.gradients + self.moments


@dataclass(frozen=True)
class Measured:
    """What one rank did in a step.

    Args:
        sent: bytes by (axis, collective).
        calls: number of collectives likewise.
        held: see there.
        resident: growth of the process's peak resident memory since before the model was made, in bytes.
    """

    sent: Counter[tuple[str, str]]
    calls: Counter[tuple[str, str]]
    held: Held
    resident: int


@register("bench", "communication")
@dataclass(frozen=True)
class Communication:
    """Bytes sent per step, axis and collective, and bytes held per rank, for any layouts.

    Args:
        layouts: as in tools.parity.
        moe_layouts: likewise, with experts in the model.
        layers: of the decoder.
        hidden: its width, in features; head_dim is 32.
        vocabulary: its token ids.
        sequences: of a global batch.
        sequence_length: tokens of each.
        precision: "fp32" or "bf16" of forward and backward.
    """

    layouts: list[str] = field(
        default_factory=lambda: [
            *("dp2.mb2", "dp2.zero1.mb2", "dp2.zero2.mb2", "dp2.zero3.mb2", "dp_replicate2.dp2.zero2.mb2"),
            *("tp2.mb2", "cp2.mb2", "cp2.ring.mb2", "pp2.mb2", "pp2.zbv.mb2", "pp2.dp2.zero2.mb2"),
            "pp2.dp2.tp2.zero3.mb2",
        ]
    )
    moe_layouts: list[str] = field(default_factory=lambda: ["dp2.ep2.zero3.mb2"])
    layers: int = 4
    hidden: int = 256
    vocabulary: int = 4096
    sequences: int = 8
    sequence_length: int = 128
    precision: str = "fp32"

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it: means over the ranks, in MB (10^6 bytes)."""
        figures: dict[str, float] = {"model (MB of fp32 parameters)": self._parameters(self.model(0)) * 4 / MB}
        for experts, words in ((0, self.layouts), (8, self.moe_layouts)):
            for word in words:
                ranks = self.measure(parse(word), experts)
                mean = sum((each.sent for each in ranks), Counter())
                for (axis, kind), count in sorted(mean.items()):
                    figures[f"{word}: {axis} {kind} (MB sent)"] = count / len(ranks) / MB
                figures[f"{word}: most held by a rank (MB)"] = max(each.held.total for each in ranks) / MB
                figures[f"{word}: peak RSS growth of a rank (MB)"] = max(each.resident for each in ranks) / MB
        return figures

    def model(self, experts: int) -> DecoderConfig:
        heads = self.hidden // 32
        moe = MoE(experts=experts, active=2, intermediate=self.hidden)
        return DecoderConfig(
            self.layers, self.hidden, 3 * self.hidden, heads=heads, kv_heads=heads // 2, head_dim=32, moe=moe
        )

    def _parameters(self, model: DecoderConfig) -> int:
        return model.parameter_count(self.vocabulary)

    def measure(self, layout: Layout, experts: int = 0) -> list[Measured]:
        """What each rank does in the second step: the first also makes buffers."""
        return run_ranks(layout.world_size, _measure, self, layout, experts, timeout_s=300)

    def batch(self, step: int) -> MicroBatch:
        generator = torch.Generator().manual_seed(step)
        shape = self.sequences, self.sequence_length
        tokens_BL = torch.randint(0, self.vocabulary, (shape[0], shape[1] + 1), generator=generator)
        return MicroBatch(
            tokens_BL=tokens_BL[:, :-1].contiguous(),
            labels_BL=tokens_BL[:, 1:].contiguous(),
            positions_BL=torch.arange(shape[1]).expand(shape),
            documents_BL=torch.zeros(shape, dtype=torch.int64),
            samples_B=torch.arange(shape[0]),
        )


def _measure(bench: Communication, layout: Layout, experts: int) -> Measured:
    """On each rank."""
    world = distributed.start()
    before = _peak()
    with torch.device("meta"):
        model = bench.model(experts).build(bench.vocabulary)
    settings = Settings(precision=bench.precision)
    engine = Native().build(
        model,
        layout,
        AdamW().build,
        world=world,
        settings=settings,
        initialise=lambda part: initialise(part, 0),  # type: ignore[arg-type]
    )
    for step in range(2):
        share = shares(bench.batch(step), engine.dp_rank, engine.dp_size, layout.micro_batches)
        with Traffic(layout) as traffic, Between(engine) as between:
            engine.train_step(share, CausalLM(), 1.0)
    assert between.held is not None
    return Measured(traffic.bytes, traffic.calls, between.held, _peak() - before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Between:
    """Looks at what an engine holds before each backward pass of a step.

    Attributes:
        held: the most of it, of all parts of this rank; None before a step.
    """

    def __init__(self, engine: NativeEngine):
        self.engine = engine
        self.held: Held | None = None

    def __enter__(self) -> "Between":
        for part in self.engine.parts:
            part.placed.accumulate = self._looking(part.placed.accumulate)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for part in self.engine.parts:
            del part.placed.accumulate

    def _looking(self, accumulate: Any) -> Any:
        def look(last: bool) -> None:
            now = held(self.engine)
            if self.held is None or now.total > self.held.total:
                self.held = now
            accumulate(last)

        return look


def held(engine: NativeEngine) -> Held:
    """What a rank of an engine holds now."""
    parameters = list(engine.parameters.values())
    gathered, gradients = 0, sum(_bytes(p.grad) for p in parameters)
    for part in engine.parts:
        for unit in part.model.modules():
            if isinstance(unit, FSDPModule):
                for each in _sharded_parameters(unit):
                    whole = getattr(each, "_unsharded_param", None)
                    if whole is not None:
                        gathered += whole.untyped_storage().size()
                        gradients += _bytes(whole.grad)
                    gradients += _bytes(each.unsharded_accumulated_grad)
    moments = sum(_bytes(value) for state in engine.optimizer.state.values() for value in state.values())
    return Held(sum(map(_bytes, parameters)), gathered, gradients, moments)


def _sharded_parameters(unit: FSDPModule) -> list[Any]:
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.13; before
    return [each for group in groups if group is not None for each in group.fsdp_params]


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else local_of(tensor).nbytes
