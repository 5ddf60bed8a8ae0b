"""Determinism: the same layout gives the same bits, whatever the axes."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel import determinism, distributed
from parallel.engine import Settings
from parallel.engines.native import Native
from tests.ranks import run_ranks
from tools.parity.layouts import parse
from tools.parity.training import MODEL, MUON, VOCABULARY, Training, train
from train.models.moe import MoE
from train.models.transformer import initialise

EXPERTS = MoE(experts=4, active=2, intermediate=48, first=1)
TRAINING = Training(optim=MUON, model=replace(MODEL, layers=2, dropout=0.1, moe=EXPERTS), ema=0.9)

Bits = tuple[list[float], list[float], dict[str, Tensor]]


def bits(words: list[str]) -> list[Bits]:
    """Losses, norms and averaged weights of trainings at some layouts."""
    torch.manual_seed(os.getpid())  # nothing may depend on it
    found = []
    for word in words:
        layout = parse(word)
        model = TRAINING.model.build(VOCABULARY)
        initialise(model, 0)
        settings = Settings(precision="fp32", ema=TRAINING.ema, deterministic=True)
        engine = Native().build(model, layout, MUON.build, world=distributed.start(), settings=settings)
        trajectory = train(engine, layout, TRAINING, range(2))
        found.append((trajectory.losses, trajectory.grad_norms, trajectory.weights))
    distributed.stop()
    return found


def check(ranks: int, words: list[str]) -> None:
    first, second = (run_ranks(ranks, bits, words)[0] for _ in range(2))
    for word, (losses, norms, weights), (losses_again, norms_again, weights_again) in zip(
        words, first, second, strict=True
    ):
        assert (word, losses, norms) == (word, losses_again, norms_again)
        assert weights.keys() == weights_again.keys() and weights
        assert all(torch.equal(weight, weights_again[name]) for name, weight in weights.items()), word


def test_two_runs_on_two_ranks_have_the_same_bits() -> None:
    check(2, ["dp2.zero3.mb2", "tp2.mb2", "pp2.mb2", "cp2.mb2", "dp2.ep2.zero3.mb2"])


@pytest.mark.slow
def test_two_runs_on_four_ranks_have_the_same_bits() -> None:
    check(
        4, ["dp_replicate2.dp2.zero2.mb2", "dp2.tp2.zero3.mb2", "pp2.dp2.zero1.mb2", "cp2.tp2.mb2", "dp2.ep2.tp2.zero2"]
    )


def settings_of_a_process() -> tuple[dict[str, str], bool]:
    determinism.enforce()
    return {name: os.environ[name] for name in determinism.ENVIRONMENT}, torch.are_deterministic_algorithms_enabled()


def test_what_the_user_set_stays() -> None:
    assert run_ranks(1, settings_of_a_process) == [(determinism.ENVIRONMENT, True)]
    [(environment, _)] = run_ranks(1, settings_of_a_process, env={"NCCL_ALGO": "Ring"})
    assert environment["NCCL_ALGO"] == "Ring"
