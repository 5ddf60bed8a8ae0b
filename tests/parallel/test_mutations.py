"""A break is seen: each technique, broken once, turns a cell of the matrix red."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.parallel import mutations as broken
from tools.parity import MODEL, Cell, Training, compare
from tools.parity.cells import AVERAGED, BALANCED, BIASED, DROPPED, EXPERTS, MUONS, PLAIN, made

RESTLESS = replace(BALANCED, model=replace(BALANCED.model, moe=replace(BALANCED.model.moe, bias_rate=0.1)))
"""Biases that move far enough within a few steps to send tokens elsewhere."""
QUICK = [
    (broken.mean_of_means, "dp2.zero2.mb2", PLAIN),
    (broken.skipped_all_reduce, "dp2.mb2", PLAIN),
    (broken.clipping_per_rank, "dp2.zero2.mb2", PLAIN),
    (broken.replicated_gradients_not_added, "tp2", PLAIN),
    (broken.weight_gradients_dropped, "pp2.zbv", PLAIN),
]
SLOW = [
    (broken.own_weight, "dp2.zero1.mb2", PLAIN),
    (broken.replicas_not_added, "dp_replicate2.dp2.zero2.mb2", PLAIN),
    (broken.copies_counted_apart, "dp2.mb2", PLAIN),
    (broken.copies_counted_apart, "tp4", PLAIN),
    (broken.twins_counted_twice, "pp2", PLAIN),
    (broken.random_by_rank, "dp2.zero3.mb2", DROPPED),
    (broken.stale_shards, "dp2.zero2.mb2", PLAIN),
    (broken.stale_average, "dp2.zero1", AVERAGED),
    (broken.matrices_in_parts, "dp2.zero1", MUONS),
    (broken.moments_forgotten, "dp2.zero1 > dp2.zero3", PLAIN),
    (broken.twins_left_behind, "mb2 > pp2.zbv", PLAIN),
    (broken.first_slice_everywhere, "tp2", DROPPED),
    (broken.slices_in_reverse, "tp2", PLAIN),
    (broken.own_rows_are_the_vocabulary, "tp2", PLAIN),
    (broken.bias_of_every_rank, "tp2", BIASED),
    (broken.first_head_everywhere, "tp4", PLAIN),
    (broken.loss_counted_by_every_rank, "tp2", PLAIN),
    (broken.keys_in_order_of_ranks, "cp2", PLAIN),
    (broken.own_keys_gradients_only, "cp2", PLAIN),
    (broken.ring_stands_still, "cp2.ring", PLAIN),
    (broken.gradient_of_another_micro_batch, "pp2.mb4", PLAIN),
    (broken.tied_gradients_not_added, "pp2", PLAIN),
    (broken.rows_out_of_order, "dp2.ep2", EXPERTS),
    (broken.balance_counted_by_every_rank, "tp2", EXPERTS),
    (broken.fresh_dropout_when_recomputed, "dp2.zero3.recompute_full", DROPPED),
    (broken.biases_by_own_counts, "dp2", RESTLESS),
]


def small(name: str, way: str, training: Training) -> Cell:
    """Few steps of four layers: enough stages for every schedule."""
    model = replace(training.model, layers=MODEL.layers)
    return made("mutations", name, way, replace(training, model=model, steps=4))


def check(sabotage: Callable[[], None], way: str, training: Training) -> None:
    [row] = compare([small(sabotage.__name__, way, training)], sabotage)
    assert row.failure == ""
    assert row.margin > 20, f"{sabotage.__name__} is hardly seen: {row}"


@pytest.mark.parametrize(("sabotage", "way", "training"), QUICK, ids=lambda value: getattr(value, "__name__", None))
def test_a_break_is_seen(sabotage: Callable[[], None], way: str, training: Training) -> None:
    check(sabotage, way, training)


@pytest.mark.slow
@pytest.mark.parametrize(("sabotage", "way", "training"), SLOW, ids=lambda value: getattr(value, "__name__", None))
def test_every_break_is_seen(sabotage: Callable[[], None], way: str, training: Training) -> None:
    check(sabotage, way, training)


@pytest.mark.slow
def test_whole_the_same_cells_agree() -> None:
    rows = compare([small(f"{s.__name__} {way}", way, training) for s, way, training in (*QUICK, *SLOW)])
    assert [str(row) for row in rows if not row.passed] == []
