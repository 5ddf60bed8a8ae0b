"""Schedules: warm-up, shape, end."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from train.optim.schedules import Constant, Cosine, InverseSqrt, Linear, Schedule, WarmupStableDecay

ALL = [Constant, Linear, Cosine, WarmupStableDecay, InverseSqrt]


@pytest.mark.parametrize("kind", ALL)
def test_every_schedule_warms_up_linearly_and_wastes_no_step_on_a_rate_of_0(kind: type[Schedule]) -> None:
    schedule = kind(warmup=4)
    assert [schedule.factor(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert min(schedule.factor(step, 100) for step in range(100)) > 0


@pytest.mark.parametrize("kind", ALL)
def test_no_schedule_rises_after_its_warm_up_or_jumps_at_its_end(kind: type[Schedule]) -> None:
    schedule = kind(warmup=10)
    factors = [schedule.factor(step, 1000) for step in range(9, 1000)]
    assert factors[0] == 1.0
    assert all(0 <= after <= before for before, after in pairwise(factors))
    assert all(before - after < 0.08 for before, after in pairwise(factors))


@pytest.mark.parametrize("kind", ALL)
def test_no_warm_up_starts_at_the_base_rate(kind: type[Schedule]) -> None:
    assert kind().factor(0, 10) == 1.0


@pytest.mark.parametrize("kind", [Linear, Cosine, WarmupStableDecay])
def test_decay_ends_at_the_floor(kind: Any) -> None:
    schedule = kind(warmup=5, floor=0.25)
    assert schedule.factor(10_000, 10_000) == pytest.approx(0.25)
    assert schedule.factor(9_999, 10_000) == pytest.approx(0.25, abs=0.01)


def test_wsd_is_flat_until_its_decay() -> None:
    schedule = WarmupStableDecay(warmup=10, decay=0.2)
    factors = [schedule.factor(step, 110) for step in range(10, 110)]
    assert factors[:81] == [1.0] * 81
    assert factors[85] == pytest.approx(1 - 0.25**0.5)  # a quarter of the decay


def test_inverse_sqrt_halves_when_the_steps_quadruple() -> None:
    schedule = InverseSqrt(warmup=100)
    assert schedule.factor(399, 0) == pytest.approx(0.5)
    assert schedule.factor(1599, 0) == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ALL)
def test_a_run_that_is_all_warm_up_does_not_divide_by_nothing(kind: type[Schedule]) -> None:
    assert kind(warmup=3).factor(3, 3) <= 1.0


def test_values_out_of_range_are_all_named() -> None:
    config: Any = SimpleNamespace(stage=SimpleNamespace(steps=10))
    found = WarmupStableDecay(warmup=11, decay=1.5, floor=-0.1).problems(config, 1)
    assert [p.key for p in found] == ["schedule.warmup", "schedule.floor", "schedule.decay"]
    assert "stage.steps=10" in found[0].fix
    assert [p.key for p in Constant(warmup=-1).problems(config, 1)] == ["schedule.warmup"]
    assert Cosine(warmup=10).problems(config, 1) == []
