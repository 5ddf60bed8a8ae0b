"""Gradient clipping: one norm, over all axes and experts, whatever the layout."""

from dataclasses import replace

import pytest

from parallel import distributed
from tests.ranks import run_ranks
from tools.parity.layouts import parse
from tools.parity.training import MODEL, Training, build, train
from train.models.moe import MoE

EXPERTS = MoE(experts=4, active=4, intermediate=48, first=1)
"""All active: in bf16 a rounded score would choose others."""

TRAINING = Training(model=replace(MODEL, layers=2, qkv_bias=True, moe=EXPERTS), clip=0.5)


def norms(words: list[str], precision: str) -> list[list[float]]:
    """Gradient norms of the first steps at some layouts."""
    world = distributed.start()
    training = replace(TRAINING, precision=precision)
    layouts = [parse(word) for word in words]
    found = [train(build(layout, training, world), layout, training, range(2)).grad_norms for layout in layouts]
    distributed.stop()
    return found


def check(ranks: int, words: list[str], precision: str, relative: float) -> None:
    [[expected]] = run_ranks(1, norms, ["alone"], precision)
    assert min(expected) > TRAINING.clip  # the second step would show a first one clipped otherwise
    for found in run_ranks(ranks, norms, words, precision):
        assert found == [pytest.approx(expected, rel=relative)] * len(words)


@pytest.mark.parametrize(("precision", "relative"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_every_rank_of_every_axis_finds_the_norm_of_one_process(precision: str, relative: float) -> None:
    check(2, ["dp2.zero0", "dp2.zero3", "tp2", "pp2", "cp2", "dp2.ep2.zero1"], precision, relative)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "relative"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_so_do_products_of_axes(precision: str, relative: float) -> None:
    words = ["dp_replicate2.dp2.zero2", "dp2.tp2.zero3", "pp2.tp2", "dp2.ep2.tp2.zero3", "dp4.ep2.zero3", "cp2.pp2"]
    check(4, words, precision, relative)
