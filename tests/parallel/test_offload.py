"""State in host memory changes where it waits, and no bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel import distributed, offload
from parallel.layout import Layout
from parallel.offload import Offloaded
from tests.ranks import run_ranks
from tools.parity.training import ADAMW, MUON, Training, build, train
from train.optim.adam8bit import Adam8bit

OFFLOADS = ("none", "optimizer", "parameters")


def runs(layout: Layout, training: Training) -> list[tuple[list[float], dict[str, Tensor], dict[str, Tensor]]]:
    """Losses and norms, weights, and this rank's state, for each way to offload."""
    world = distributed.start()
    offload.PART_ELEMENTS = 2**13  # many parts
    found = []
    for way in OFFLOADS:
        offloaded = replace(layout, offload=way)
        engine = build(offloaded, training, world)
        run = train(engine, offloaded, training, range(training.steps))
        state = {name: getattr(value, "_local_tensor", value) for name, value in engine.state().items()}
        found.append((run.losses + run.grad_norms, run.weights, state))
    return found


@pytest.mark.parametrize(
    ("layout", "optim"),
    [
        (Layout(micro_batches=2), ADAMW),
        (Layout(dp_shard=2, zero=3, micro_batches=2), ADAMW),
        (Layout(dp_shard=2, zero=1, micro_batches=2), MUON),
        (Layout(tp=2), ADAMW),
        (Layout(pp=2, micro_batches=2), ADAMW),
        (Layout(dp_shard=2, zero=2), Adam8bit(lr=1e-3)),
    ],
    ids=["alone", "zero3", "muon-zero1", "tp", "pp", "adam8bit"],
)
def test_a_run_is_the_same_to_the_bit(layout: Layout, optim: Any) -> None:
    training = Training(optim=optim, steps=3, ema=0.9)
    for expected, *others in run_ranks(layout.world_size, runs, layout, training):
        for figures, weights, state in others:
            assert figures == expected[0]
            for one, other in ((weights, expected[1]), (state, expected[2])):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_a_part_of_the_moments_is_away_from_home_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PART_ELEMENTS", 8)
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(5)]
    optimizer = torch.optim.AdamW(parameters)
    offloaded = Offloaded(optimizer, parameters)
    assert [len(part) for part in offloaded.parts] == [2, 2, 1]
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    offloaded.step()
    homes = [optimizer.state[parameter]["exp_avg"] for parameter in parameters]
    together: list[int] = []
    step = optimizer.step

    def watched() -> None:
        moved = [optimizer.state[p]["exp_avg"] is not home for p, home in zip(parameters, homes, strict=True)]
        together.append(sum(moved))
        step()

    optimizer.step = watched  # type: ignore[method-assign, assignment]
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    offloaded.step()
    assert together == [2, 2, 1]
    assert all(optimizer.state[p]["exp_avg"] is home for p, home in zip(parameters, homes, strict=True))
