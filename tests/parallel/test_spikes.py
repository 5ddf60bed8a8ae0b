"""Spikes: what is judged far off, what is not, and that the history is that of the steps that were taken."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel import distributed
from parallel.engine import LossTerms, Outputs, Settings
from parallel.engines.native import Native, NativeEngine
from parallel.layout import Layout
from parallel.reduce import local_of
from parallel.spikes import Spikes
from tests.ranks import run_ranks
from tools.parity import ADAMW, MODEL, VOCABULARY, batch_of, shares
from train.models.transformer import initialise
from train.objectives.clm import CausalLM

CPU = torch.device("cpu")


def judged(spikes: Spikes, losses: list[float], norms: list[float] | None = None) -> list[float]:
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [spikes.judge(torch.tensor(loss), torch.tensor(norm)).item() for loss, norm in pairs]


def wavering(count: int) -> list[float]:
    return [3.0 + 0.3 * (-1) ** i for i in range(count)]


def test_a_loss_or_a_norm_far_above_the_last_ones_is_a_spike() -> None:
    for place in (0, 1):
        spikes = Spikes(4.0, 16, CPU)
        ordinary, figures = wavering(20), [[1.0, 1.0], [1.0, 1.0]]
        figures[place] = [4.1, 5.0]  # 3.7 standard deviations above the mean, and 5.0
        assert judged(spikes, ordinary, ordinary) == [0.0] * 20
        assert judged(spikes, *figures) == [0.0, 1.0]


def test_far_below_is_no_spike() -> None:
    assert judged(Spikes(3.0, 8, CPU), [*wavering(8), 0.1]) == [0.0] * 9


def test_the_first_half_of_a_window_is_only_remembered() -> None:
    assert judged(Spikes(3.0, 8, CPU), [1.0, 1000.0, 1.0, 50.0]) == [0.0] * 4
    assert judged(Spikes(3.0, 8, CPU), [1.0, 1.0, 1.0, 1.0, 50.0]) == [0.0] * 4 + [1.0]


def test_noise_on_a_loss_that_stands_still_is_no_spike() -> None:
    assert judged(Spikes(6.0, 8, CPU), [*[2.0] * 8, 2.0001, 2.1]) == [0.0] * 10
    assert judged(Spikes(6.0, 8, CPU), [*[2.0] * 8, 2.2])[-1] == 1.0  # 10 %


def test_what_is_left_out_does_not_enter_the_history() -> None:
    spikes = Spikes(3.0, 8, CPU)
    judged(spikes, wavering(8))
    before = {name: tensor.clone() for name, tensor in spikes.state().items()}
    assert judged(spikes, [9.0, math.nan, 9.0, math.inf], [1.0, 1.0, math.nan, 1.0]) == [1.0] * 4
    assert all(torch.equal(before[name], tensor) for name, tensor in spikes.state().items())


def test_only_the_last_steps_of_the_window_count() -> None:
    spikes = Spikes(3.0, 8, CPU)
    assert judged(spikes, [100.0] * 4 + [1.0] * 8 + [1.001, 2.0])[-2:] == [0.0, 1.0]
    assert spikes.count.item() == 13
    assert set(spikes.state()["engine.spikes.history"][0].tolist()) == {1.0, torch.tensor(1.001).item()}


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_a_figure_that_is_not_finite_is_left_out_from_the_first_step_on(strength: float) -> None:
    assert judged(Spikes(strength, 8, CPU), [math.nan, 1.0], [1.0, math.inf]) == [1.0, 1.0]


def test_without_a_strength_nothing_finite_is_left_out_and_nothing_is_kept() -> None:
    spikes = Spikes(0.0, 4, CPU)
    assert judged(spikes, [*wavering(8), 1e9]) == [0.0] * 9
    assert spikes.state() == {}


def test_a_history_that_is_loaded_judges_as_the_one_that_was_saved() -> None:
    spikes, other = Spikes(3.0, 8, CPU), Spikes(3.0, 8, CPU)
    judged(spikes, wavering(11))
    for name, tensor in other.state().items():
        tensor.copy_(spikes.state()[name])
    figures = [3.2, 9.0, 3.9, 4.0, 4.2, 9.0]
    assert judged(spikes, figures) == judged(other, figures)


@dataclass(frozen=True)
class Jolted(CausalLM):
    """Causal language modelling, but one sample counts more."""

    factor: float = 1.0

    def loss(self, outputs: Outputs, micro_batch: Any) -> LossTerms:
        terms = super().loss(outputs, micro_batch)
        return replace(terms, total=terms.total * (self.factor if 3 in micro_batch.samples_B else 1.0))


def engine_of(layout: Layout) -> NativeEngine:
    model = replace(MODEL, layers=1).build(VOCABULARY)
    initialise(model, 0)
    settings = Settings(precision="fp32", ema=0.9, skip_spikes=6.0, spike_window=4)
    return Native().build(model, layout, ADAMW.build, world=distributed.start(), settings=settings)


def step(engine: NativeEngine, factor: float = 1.0) -> float:
    share = shares(batch_of(0), engine.dp_rank, engine.dp_size, 2)  # sample 3 belongs to data-parallel rank 0
    return engine.train_step(share, Jolted(factor=factor), 1.0).skipped.item()


def copies(engine: NativeEngine) -> dict[str, Tensor]:
    return {name: local_of(tensor).clone() for name, tensor in engine.state().items()}


def jolt(layout: Layout, directory: Path) -> tuple[list[float], list[str]]:
    """A spike on the first step, which is not judged; two ordinary ones; a checkpoint; a spike."""
    engine = engine_of(layout)
    skipped = [step(engine, factor) for factor in (2.0, 1.0, 1.0)]
    dcp.save(engine.state(), checkpoint_id=directory)
    before = copies(engine)
    skipped.append(step(engine, 50.0))
    after = copies(engine)
    return skipped, [name for name in before if not torch.equal(before[name], after[name])]


def jolt_again(layout: Layout, directory: Path) -> list[float]:
    engine = engine_of(layout)
    dcp.load(engine.state(), checkpoint_id=directory)
    engine.loaded()
    return [step(engine, factor) for factor in (50.0, 1.0)]


def test_a_spike_on_one_rank_changes_nothing_on_any_and_the_history_judges_at_another_layout(tmp_path: Path) -> None:
    for skipped, changed in run_ranks(2, jolt, Layout(dp_shard=2, zero=3, micro_batches=2), tmp_path / "a"):
        assert skipped == [0.0, 0.0, 0.0, 1.0]
        assert changed == ["engine.steps"]
    assert run_ranks(1, jolt_again, Layout(micro_batches=2), tmp_path / "a") == [[1.0, 0.0]]
    assert run_ranks(2, jolt_again, Layout(dp_shard=2, micro_batches=2), tmp_path / "a") == [[1.0, 0.0]] * 2
