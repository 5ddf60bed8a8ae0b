"""Recomputation keeps less, computes more, and changes no bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from parallel import distributed
from parallel.layout import Layout
from parallel.recompute import recompute, recomputing, spread
from tests.ranks import run_ranks
from tools.parity.training import MODEL, Training, batch_of, build, train
from train.models.moe import MoE
from train.models.transformer import Decoder, DecoderConfig, initialise

WAYS = ("none", "full", "selective", "0.5")
DROPPED = replace(MODEL, dropout=0.1)


class Held(TorchDispatchMode):
    """Knows how many bytes of what was computed below it are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def decoder(how: str, config: DecoderConfig = DROPPED) -> Decoder:
    model = config.build(97)
    initialise(model, 0)
    recompute(list(model.blocks), how)
    return model.train()


def logprobs(model: Decoder, **options: Any) -> Tensor:
    batch = batch_of(0)
    keys_B = torch.arange(batch.tokens_BL.shape[0])
    fields = (batch.tokens_BL, batch.positions_BL, batch.documents_BL, batch.labels_BL)
    return model(*fields, dropout_keys_B=keys_B, **options)


def held_bytes(how: str) -> int:
    model = decoder(how)
    with Held() as held:
        loss = logprobs(model).sum()
        kept = held.bytes()
    loss.backward()
    return kept


def flops(how: str) -> int:
    model = decoder(how)
    with FlopCounterMode(display=False) as counter:
        logprobs(model).sum().backward()
    return counter.get_total_flops()


def test_full_keeps_least_and_selective_less_than_none() -> None:
    none, full, selective, half = map(held_bytes, WAYS)
    assert full < 0.25 * none
    assert full < selective < 0.7 * none
    assert full < half < none


def test_selective_repeats_no_product_and_full_every_one_of_a_block() -> None:
    none, full, selective, half = map(flops, WAYS)
    assert selective == none
    blocks = decoder("none")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logprobs(blocks)
    assert full > none
    assert half - none == (full - none) // 2
    assert full - none < counter.get_total_flops()  # the head is not repeated


@pytest.mark.parametrize("how", WAYS[1:])
def test_gradients_are_the_same_bits(how: str) -> None:
    gradients = []
    for model in (decoder("none"), decoder(how)):
        logprobs(model).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def trajectories(layout: Layout, ways: tuple[str, ...], training: Training) -> list[tuple[list[float], dict[str, Any]]]:
    world = distributed.start()
    found = []
    for how in ways:
        recomputed = replace(layout, recompute=how)
        engine = build(recomputed, training, world)
        run = train(engine, recomputed, training, range(training.steps))
        found.append((run.losses + run.grad_norms, run.weights))
    return found


EXPERTS = replace(DROPPED, layers=2, moe=MoE(experts=4, active=2, intermediate=32, selection_bias=True))


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (Layout(dp_shard=2, zero=3, micro_batches=2), DROPPED),
        (Layout(tp=2), DROPPED),
        (Layout(cp=2, zero=1), DROPPED),
        (Layout(pp=2, schedule="zbv", virtual_stages=2, micro_batches=4), DROPPED),
        (Layout(pp=2, micro_batches=2), DROPPED),
        (Layout(dp_shard=2, zero=2), EXPERTS),
    ],
    ids=["zero3", "tp", "cp", "zbv", "1f1b", "experts"],
)
def test_a_run_is_the_same_to_the_bit_on_the_same_layout(layout: Layout, model: Any) -> None:
    training = Training(model=model, steps=3)
    expected, *others = run_ranks(2, trajectories, layout, WAYS, training)[0]
    for losses, weights in others:
        assert losses == expected[0]
        assert all(torch.equal(weights[name], weight) for name, weight in expected[1].items())


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.answers: list[bool] = []

    def forward(self, x_N: Tensor) -> Tensor:
        self.answers.append(recomputing())
        return (x_N * self.weight).exp()


def test_a_block_can_tell_the_second_time_from_the_first() -> None:
    block = Asking()
    recompute([block], "full")
    block(torch.ones(3)).sum().backward()
    with torch.no_grad():
        block(torch.ones(3))
    assert block.answers == [False, True, False]
    assert not recomputing()


@pytest.mark.parametrize("how", WAYS[1:])
def test_what_experts_count_is_counted_once(how: str) -> None:
    seen = []
    for way in ("none", how):
        model = decoder(way, EXPERTS)
        logprobs(model, sequence_weights_B=torch.ones(8)).sum().backward()
        seen.append(torch.stack([block.mlp.gate.statistics() for block in model.blocks]))
    assert seen[0].sum() > 0
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("blocks", "share", "chosen"), [(4, 0.5, [1, 3]), (5, 0.4, [2, 4]), (3, 0.1, [2]), (2, 0.9, [0, 1])]
)
def test_a_share_is_spread_evenly(blocks: int, share: float, chosen: list[int]) -> None:
    modules = [nn.Identity() for _ in range(blocks)]
    assert [modules.index(block) for block in spread(modules, share)] == chosen


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS[1:])
def test_compiled_blocks_can_be_recomputed(how: str) -> None:
    losses = []
    for way in ("none", how):
        model = decoder(way)
        for block in model.blocks:
            block.compile(backend="aot_eager")  # the graphs, without machine code
        loss = logprobs(model).sum()
        loss.backward()
        losses.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
