"""Adam with 8-bit moments: how they are rounded, kept, skipped and saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from parallel import distributed
from parallel.layout import Layout
from parallel.reduce import local_of
from tests.ranks import run_ranks
from tools.parity import MODEL, Training, build, train
from train.optim.adam8bit import BLOCK, Adam8bit, levels, rounded, widened
from train.optim.adamw import AdamW

TRAINING = Training(optim=Adam8bit(lr=1e-3, eps=1e-6), model=replace(MODEL, layers=1))


def values(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, generator=generator) * 10.0 ** torch.randint(-6, 3, (count,), generator=generator)


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 5 * BLOCK + 7])
@pytest.mark.parametrize("signed", [True, False])
def test_what_was_widened_rounds_to_the_same_codes_and_scales(count: int, signed: bool) -> None:
    values_X = values(count) if signed else values(count).abs()
    codes_X, scales_R = rounded(values_X, levels(signed))
    again_X, scales_again_R = rounded(widened(codes_X, scales_R, levels(signed)), levels(signed))
    assert torch.equal(codes_X, again_X) and torch.equal(scales_R, scales_again_R)
    assert (codes_X.dtype, codes_X.shape, scales_R.shape) == (torch.uint8, (count,), (-(-count // BLOCK),))


def test_the_largest_of_a_block_is_exact_and_the_others_are_within_half_a_level() -> None:
    values_X = values(BLOCK)
    codes_X, scales_R = rounded(values_X, levels(True))
    found_X = widened(codes_X, scales_R, levels(True))
    largest = values_X.abs().argmax()
    assert found_X[largest] == values_X[largest]
    widest = (levels(True)[1:] - levels(True)[:-1]).max() * scales_R.abs()
    assert ((found_X - values_X).abs() <= widest / 2 * 1.001).all()


def test_blocks_of_zeros_and_empty_parts_stay_so() -> None:
    assert not widened(*rounded(torch.zeros(BLOCK + 1), levels(True)), levels(True)).any()
    assert [part.numel() for part in rounded(torch.zeros(0), levels(False))] == [0, 0]


def stepped(option: AdamW | Adam8bit, steps: int) -> tuple[Tensor, torch.optim.Optimizer]:
    model = nn.Linear(40, 60)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    optimizer = option.build(model)
    for number in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    return model.weight.detach(), optimizer


def test_updates_are_nearly_adamws() -> None:
    start, _ = stepped(AdamW(), 0)
    wide, _ = stepped(AdamW(lr=1e-2), 20)
    ours, _ = stepped(Adam8bit(lr=1e-2), 20)
    assert (ours - wide).norm() < 0.05 * (wide - start).norm()


def test_a_moment_of_a_matrix_takes_a_byte_and_a_bias_keeps_adamws() -> None:
    weight, optimizer = stepped(Adam8bit(), 1)
    matrix, bias = (optimizer.state[optimizer.param_groups[i]["params"][0]] for i in (0, -1))
    kept = sum(tensor.nbytes for name, tensor in matrix.items() if name != "step")
    assert kept < 2 * weight.numel() * (1 + 5 / BLOCK)
    assert {tensor.dtype for tensor in bias.values()} == {torch.float32}


def states(layout: Layout) -> tuple[dict[str, tuple[torch.Size, torch.dtype]], float]:
    engine = build(layout, TRAINING, distributed.start())
    loss = train(engine, layout, TRAINING, range(2)).losses[-1]
    return {name: (tensor.shape, tensor.dtype) for name, tensor in engine.state().items()}, loss


def test_a_checkpoint_holds_adamws_moments_at_every_layout() -> None:
    [(eight, _)] = run_ranks(1, states, Layout())
    assert {kind for name, (_, kind) in eight.items() if name.startswith("optimizer.")} == {torch.float32}
    assert {name.rpartition(".")[2] for name in eight if name.startswith("optimizer.")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    assert [names for names, _ in run_ranks(2, states, Layout(dp_shard=2, zero=3))] == [eight] * 2


def resumed(layout: Layout, directory: Path) -> tuple[list[float], list[float]]:
    """Losses of steps 2 to 4 of one training, and of another that takes it over after 2."""
    world = distributed.start()
    first, second = build(layout, TRAINING, world), build(layout, TRAINING, world, seed=1)
    train(first, layout, TRAINING, range(2))
    dcp.save(first.state(), checkpoint_id=directory)
    dcp.load(second.state(), checkpoint_id=directory)
    second.loaded()
    same = all(torch.equal(local_of(a), local_of(second.state()[name])) for name, a in first.state().items())
    assert same
    going_on, taken_over = (train(engine, layout, TRAINING, range(2, 5)).losses for engine in (first, second))
    return going_on, taken_over


@pytest.mark.parametrize("layout", [Layout(), Layout(dp_shard=2, zero=3, micro_batches=2)])
def test_a_resumed_run_has_the_same_bits(layout: Layout, tmp_path: Path) -> None:
    for first, second in run_ranks(layout.world_size, resumed, layout, tmp_path / "checkpoint"):
        assert first == second


def continued(layout: Layout, directory: Path) -> list[float]:
    engine = build(layout, TRAINING, distributed.start(), seed=1)
    dcp.load(engine.state(), checkpoint_id=directory)
    engine.loaded()
    return train(engine, layout, TRAINING, range(2, 5)).losses


def test_a_run_goes_on_at_another_layout(tmp_path: Path) -> None:
    [(expected, _)] = run_ranks(1, resumed, Layout(), tmp_path / "checkpoint")
    for found in run_ranks(2, continued, Layout(dp_shard=2, zero=3), tmp_path / "checkpoint"):
        assert found == pytest.approx(expected, abs=1e-3)
