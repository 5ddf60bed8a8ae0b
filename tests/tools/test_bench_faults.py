"""The injection campaign, a small part of it: what is always found, what is found by statistics, what nobody sees."""

from functools import cache

import pytest
import torch

from parallel.layout import Layout
from tools.benches.faults import Faults, Injection, Outcome, flip
from train.guard import COMPUTATION, MEMORY, NONFINITE, REPLICAS, SPIKE

SMALL = Faults(horizon=3, warm_up=18)
EVERYWHERE = [
    Injection("weights", "mantissa, low", 1, 11),
    Injection("moments", "sign", 0, 12),
    Injection("activations", "exponent, low", 1, 13),
    Injection("backward", "mantissa, high", 0, 14),
    Injection("gradients", "sign", 1, 15),
    Injection("gradients", "exponent, high", 0, 16),
]


@cache
def outcomes(layout: Layout) -> dict[tuple[str, str], Outcome]:
    found, alarms = SMALL.outcomes(layout, EVERYWHERE)
    assert alarms == 0
    return {(one.target, one.bits): outcome for one, outcome in zip(EVERYWHERE, found, strict=True)}


LAYOUTS = [Layout(dp_shard=2), Layout(dp_shard=2, zero=2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bit_of_a_weight_or_a_moment_is_found_before_the_next_update(layout: Layout) -> None:
    assert outcomes(layout)["weights", "mantissa, low"].found[MEMORY] == 0
    assert outcomes(layout)["moments", "sign"].found[MEMORY] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bit_of_an_activation_or_its_gradient_is_found_by_computing_twice(layout: Layout) -> None:
    assert outcomes(layout)["activations", "exponent, low"].found[COMPUTATION] == 0
    assert outcomes(layout)["backward", "mantissa, high"].found[COMPUTATION] == 0


def test_a_bit_of_a_gradient_is_found_where_another_rank_has_the_same_and_else_by_its_size_only() -> None:
    replicated, sharded = map(outcomes, LAYOUTS)
    assert replicated["gradients", "sign"].found == {REPLICAS: 0}
    assert not sharded["gradients", "sign"].found and not sharded["gradients", "sign"].none
    assert sharded["gradients", "exponent, high"].found.keys() <= {NONFINITE, SPIKE}


def test_the_choice_is_the_same_for_the_same_seed_and_covers_every_target_and_bit() -> None:
    chosen = Faults(injections=2).chosen(2)
    assert chosen == Faults(injections=2).chosen(2) != Faults(injections=2, seed=1).chosen(2)
    assert len({(one.target, one.bits) for one in chosen}) == 25 and len(chosen) == 50


def test_a_flip_changes_one_bit_and_a_second_undoes_it() -> None:
    values = torch.ones(3)
    flip(values, 1, 31)
    assert values.tolist() == [1.0, -1.0, 1.0]
    flip(values, 1, 31)
    assert values.tolist() == [1.0, 1.0, 1.0]
