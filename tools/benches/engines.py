"""Step time of the native engine against DeepSpeed's and Megatron's at the same layout: same weights, tokens and
optimizer, in the same processes, step by step in turn.

Ranks of one machine share its cores, so the seconds say little; the ratios of steps made one after the other do.
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from conf.registry import register
from parallel import distributed
from parallel.engine import Settings
from tools.benches.communication import Communication
from tools.parity.layouts import parse
from tools.parity.training import new_engine, shares
from tools.ranks import run_ranks
from train.models.transformer import initialise
from train.objectives.clm import CausalLM
from train.optim.adamw import AdamW


@dataclass(frozen=True)
class Race:
    """A layout and those who run it.

    Args:
        layout: as in tools.parity.
        engines: options of the group `engine`; the first is the yardstick.
    """

    layout: str
    engines: tuple[str, ...]


RACES = (
    Race("dp2.mb2", ("native", "deepspeed", "megatron")),
    Race("dp2.zero1.mb2", ("native", "deepspeed", "megatron")),
    Race("dp2.zero3.mb2", ("native", "deepspeed")),
    Race("tp2.mb2", ("native", "deepspeed", "megatron")),
    Race("pp2.mb4", ("native", "megatron")),
)


@register("bench", "engines")
@dataclass(frozen=True)
class Engines:
    """Step times of engines at equal layouts, as ratios.

    Args:
        task: the model and the batch.
        steps: timed steps.
        warm_up: steps before them.
    """

    task: Communication = field(default_factory=lambda: Communication(precision="fp32"))
    steps: int = 8
    warm_up: int = 2

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it."""
        figures: dict[str, float] = {}
        for race in RACES:
            layout = parse(race.layout)
            seconds, losses = run_ranks(layout.world_size, _race, self, race, timeout_s=500)[0]
            first = race.engines[0]
            figures[f"{race.layout}: {first} (ms a step)"] = 1000 * statistics.median(seconds[first])
            for other in race.engines[1:]:
                ratios = [a / b for a, b in zip(seconds[other], seconds[first], strict=True)]
                figures[f"{race.layout}: {other} / {first}, median of steps"] = statistics.median(ratios)
                figures[f"{race.layout}: {other}, largest difference of the loss"] = max(
                    abs(a - b) for a, b in zip(losses[other], losses[first], strict=True)
                )
        return figures


def _race(bench: Engines, race: Race) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """On each rank: seconds and losses of each engine's timed steps."""
    world, task, layout = distributed.start(), bench.task, parse(race.layout)
    engines: dict[str, Any] = {}
    for name in race.engines:
        with torch.device("meta"):
            model = task.model(0).build(task.vocabulary)
        engines[name] = new_engine(name, world).build(
            model,
            layout,
            AdamW().build,
            world=world,
            settings=Settings(precision=task.precision),
            initialise=lambda part: initialise(part, 0),
        )
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    losses: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(bench.warm_up + bench.steps):
        for name, engine in engines.items():
            share = shares(task.batch(step), engine.dp_rank, engine.dp_size, layout.micro_batches)
            dist.barrier()
            began = time.perf_counter()
            loss = engine.train_step(share, CausalLM(), 1.0).loss.item()
            dist.barrier()
            if step >= bench.warm_up:
                seconds[name].append(time.perf_counter() - began)
                losses[name].append(loss)
    return seconds, losses
