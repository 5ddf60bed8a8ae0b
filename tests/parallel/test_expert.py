"""Experts on several ranks: the same rows through the same experts, the same losses attached."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import distributed, expert
from parallel.expert import Exchange
from parallel.layout import Layout
from tests.ranks import run_ranks
from tools.parity import MODEL, Cell, Training, batch_of, build, compare, shares
from train.models.moe import Experts, MoE
from train.objectives.clm import CausalLM

EXPERTS, HIDDEN = 4, 6
MOE = MoE(experts=4, active=2, intermediate=32, first=1, balance_loss=0.5, z_loss=0.1)
SMALL = Training(model=replace(MODEL, layers=2, moe=MOE), steps=3)


def layer() -> Experts:
    torch.manual_seed(0)
    experts = Experts(EXPERTS, HIDDEN, 5).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.5)
    return experts


def sent(rank: int) -> tuple[Tensor, Tensor]:
    """rows_RN and counts_E of a rank: rank 0 sends nothing to the last two experts, which are rank 1's, and little
    else; expert 3 gets rows of nobody."""
    counts_E = torch.tensor([[3, 1, 0, 0], [0, 5, 2, 0]][rank])
    rows_RN = torch.randn(
        int(counts_E.sum()), HIDDEN, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
    )
    return rows_RN, counts_E


def differences(ranks: int) -> dict[str, float]:
    world = distributed.start()
    whole, part = layer(), layer()
    mine = slice(world.rank * EXPERTS // ranks, (world.rank + 1) * EXPERTS // ranks)
    for name, parameter in list(part.named_parameters()):
        setattr(part, name, torch.nn.Parameter(parameter.detach()[mine].clone()))
    exchange = Exchange(part.forward, dist.group.WORLD)
    rows_RN, counts_E = sent(world.rank)
    found_RN, expected_RN = rows_RN.clone().requires_grad_(), rows_RN.clone().requires_grad_()
    answer_RN, right_RN = exchange(found_RN, counts_E), whole(expected_RN, counts_E)
    (answer_RN * rows_RN).sum().backward()
    (right_RN * rows_RN).sum().backward()
    found = {"rows": answer_RN - right_RN, "gradients of rows": found_RN.grad - expected_RN.grad}
    for name, parameter in part.named_parameters():
        gradient = whole.get_parameter(name).grad
        dist.all_reduce(gradient)
        found[name] = parameter.grad - gradient[mine]
    return {name: float(value.abs().max()) for name, value in found.items()}


def test_rows_and_gradients_are_those_of_all_experts_on_one_rank():
    for found in run_ranks(2, differences, 2):
        assert max(found.values()) < 1e-12, found


def metrics(layout: Layout, training: Training) -> dict[str, float]:
    engine = build(layout, training, distributed.start())
    share = shares(batch_of(0), engine.dp_rank, engine.dp_size, layout.micro_batches)
    return {name: value.item() for name, value in engine.train_step(share, CausalLM(), 1.0).metrics.items()}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, ep=2, zero=1, micro_batches=2),
        Layout(tp=2),
        Layout(pp=2, micro_batches=2),  # the first stage has no experts
        Layout(cp=2, micro_batches=2),
    ],
    ids=["ep", "tp", "pp", "cp"],
)
def test_every_rank_tells_the_load_of_all(layout):
    [expected] = run_ranks(1, metrics, Layout(), SMALL)
    assert expected["expert_load_max"] > 1 > expected["expert_load_min"]
    assert expected["balance_loss"] > 1
    for found in run_ranks(2, metrics, layout, SMALL):
        assert found == pytest.approx(expected, rel=1e-5)


def test_widths_and_stacks_that_ranks_cannot_share_evenly_train_the_same_run():
    odd = replace(SMALL, model=replace(SMALL.model, moe=replace(MOE, experts=3, intermediate=31)))
    rows = compare([Cell("tp", Layout(tp=2), odd), Cell("zero3", Layout(dp_shard=2, zero=3), odd)])
    assert all(row.passed for row in rows), rows


def attached_by_every_rank() -> None:
    """Tensor-parallel ranks attach the same losses, each the whole of them."""
    share_experts = expert.share_experts

    def shared(model: Any, *arguments: Any) -> None:
        share_experts(model, *arguments)
        for module in model.modules():
            if hasattr(module, "share"):
                module.share = 1.0

    _everywhere("share_experts", shared)


def counts_of_a_part() -> None:
    """Context-parallel ranks judge a sequence by the tokens that they have."""
    _everywhere("_adder", lambda group: lambda counts_BE: counts_BE)


def gradients_that_stay() -> None:
    """Rows travel to their experts, their gradients do not travel back."""

    def stay(ctx: Any, grad_rN: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_rN.new_zeros(sum(ctx.sent), grad_rN.shape[1]), None, None, None

    expert._AllToAll.backward = staticmethod(stay)


def unsorted_arrivals() -> None:
    """Rows are left in the order in which they came: by sender."""
    argsort = Tensor.argsort

    def identity(values: Tensor, *arguments: Any, **options: Any) -> Tensor:
        order = argsort(values, *arguments, **options)
        return torch.arange(len(order)) if options.get("stable") else order

    Tensor.argsort = identity  # type: ignore[assignment, method-assign]


def _everywhere(name: str, replacement: Callable[..., Any]) -> None:
    from parallel import place

    for module in (expert, place):
        if hasattr(module, name):
            setattr(module, name, replacement)


@pytest.mark.parametrize(
    ("sabotage", "layout"),
    [
        (attached_by_every_rank, Layout(tp=2)),
        (counts_of_a_part, Layout(cp=2, micro_batches=2)),
        (gradients_that_stay, Layout(dp_shard=2, ep=2, zero=1)),
        (unsorted_arrivals, Layout(dp_shard=2, ep=2, zero=1)),
    ],
)
def test_a_break_is_seen(sabotage, layout):
    [row] = compare([Cell("broken", layout, SMALL)], sabotage=sabotage)
    assert not row.passed
