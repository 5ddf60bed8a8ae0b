"""Attention whose tokens are shared among ranks is that of one process."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import context, distributed
from parallel.context import gather_own, indices, install, take
from parallel.layout import Layout
from tests.ranks import run_ranks
from tools.parity import Training, batch_of, build, shares
from train.models.attention import attention, visibility
from train.objectives.clm import CausalLM

LENGTH, HEADS, KV_HEADS, FEATURES = 48, 4, 2, 8


class Attending(nn.Module):
    """The seams of a decoder: one layer, and what it is told of who sees whom."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.layer.attend = attention
        self.visibility = visibility


def problem(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k and v; the gradient of what attention answers; documents, with padding."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, LENGTH, h, FEATURES, generator=generator) * 2 for h in (HEADS, KV_HEADS, KV_HEADS)]
    grad_BSHD = torch.randn(2, LENGTH, HEADS, FEATURES, generator=generator)
    documents_BS = torch.tensor([[0] * 5 + [1] * 20 + [2] * 16 + [-1] * 7, [0] * 31 + [1] * 17])
    grad_BSHD[documents_BS < 0] = 0
    return [t.to(dtype) for t in qkv], grad_BSHD.to(dtype), documents_BS


def alone(dtype: torch.dtype, causal: bool) -> list[Tensor]:
    """out and the gradients of q, k and v in one process."""
    qkv, grad_BSHD, documents_BS = problem(dtype)
    qkv = [t.requires_grad_() for t in qkv]
    out_BSHD = attention(*qkv, visibility(documents_BS, causal=causal))
    return [out_BSHD.detach(), *torch.autograd.grad(out_BSHD, qkv, grad_BSHD)]


def shared(ring: bool, dtype: torch.dtype, causal: bool, breaks: str | None = None) -> list[Tensor]:
    """A rank's tokens of the same."""
    world = distributed.start()
    context.QUERIES = 5  # several tiles to a chunk, the last of them short
    if breaks == "hops":
        arrived = context._arrived
        context._arrived = lambda transfer: torch.zeros_like(arrived(transfer))
    if breaks == "order":
        context._gathered = lambda local, group: torch.cat(dist.nn.functional.all_gather(local, group), dim=1)
    if breaks == "reduction":
        context._GatherSummed.backward = context._GatherOwn.backward
    model = Attending()
    install(model, dist.group.WORLD, ring)
    qkv, grad_BSHD, documents_BS = problem(dtype)
    q_BlHD, k_BlKD, v_BlKD = (take(t, world.size, world.rank).requires_grad_() for t in qkv)
    index_l = indices(LENGTH, world.size, world.rank)
    mine_Bl = documents_BS[:, index_l]
    visible = model.visibility(mine_Bl, causal=causal, key_documents_BS=documents_BS, index_L=index_l)
    out_BlHD = model.layer.attend(q_BlHD, k_BlKD, v_BlKD, visible)
    grads = torch.autograd.grad(out_BlHD, (q_BlHD, k_BlKD, v_BlKD), take(grad_BSHD, world.size, world.rank))
    return [out_BlHD.detach(), *grads]


def differences(found: list[list[Tensor]], expected: list[Tensor]) -> list[float]:
    """Relative, of values and gradients; padding's values are nobody's."""
    real = problem(torch.float32)[2] >= 0
    relative = []
    for number, whole in enumerate(expected):
        parts = [take(whole, len(found), rank) for rank in range(len(found))]
        masks = [take(real, len(found), rank) for rank in range(len(found))]
        pairs = [(f[number][m].double(), p[m].double()) for f, p, m in zip(found, parts, masks, strict=True)]
        relative.append(float(torch.cat([a - b for a, b in pairs]).norm() / torch.cat([b for _, b in pairs]).norm()))
    return relative


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_is_that_of_one_process(ranks: int, ring: bool, causal: bool) -> None:
    found = run_ranks(ranks, shared, ring, torch.float64, causal)
    assert max(differences(found, alone(torch.float64, causal))) < 1e-13


@pytest.mark.parametrize("ring", [False, True])
def test_in_16_bits_it_is_as_near_to_fp32_as_one_process_is(ring: bool) -> None:
    exact, rounded = alone(torch.float32, True), alone(torch.bfloat16, True)
    found = differences(run_ranks(2, shared, ring, torch.bfloat16, True), exact)
    for ours, theirs in zip(found, differences([rounded_parts(rounded, r) for r in range(2)], exact), strict=True):
        assert ours < 1.5 * theirs


def rounded_parts(whole: list[Tensor], rank: int) -> list[Tensor]:
    return [take(t, 2, rank) for t in whole]


@pytest.mark.parametrize(("breaks", "ring"), [("hops", True), ("order", False), ("reduction", False)])
def test_a_break_is_seen(breaks: str, ring: bool) -> None:
    found = run_ranks(2, shared, ring, torch.float32, True, breaks)
    assert max(differences(found, alone(torch.float32, True))) > 0.1


def test_every_rank_sees_as_many_keys_as_the_others() -> None:
    """Where later keys are hidden."""
    seen = [int((indices(48, 4, rank) + 1).sum()) for rank in range(4)]
    assert len(set(seen)) == 1
    tiles = [
        sum(
            (tile.queries.stop - tile.queries.start) * (tile.keys.stop - tile.keys.start)
            for other in range(4)
            for tile in context._tiles(12, 4, rank, other, causal=True)
        )
        for rank in range(4)
    ]
    assert len(set(tiles)) == 1


def test_ranks_share_all_tokens() -> None:
    assert sorted(torch.cat([indices(48, 4, rank) for rank in range(4)]).tolist()) == list(range(48))


def gather_and_differentiate() -> tuple[Tensor, Tensor]:
    world = distributed.start()
    whole_BS = torch.arange(2 * 8, dtype=torch.float32).view(2, 8)
    own_Bl = take(whole_BS, world.size, world.rank).requires_grad_()
    gathered_BS = gather_own(own_Bl, dist.group.WORLD)
    (gathered_BS**2).sum().backward()
    return gathered_BS.detach(), own_Bl.grad


def test_what_all_ranks_compute_from_gathered_values_is_differentiated_once() -> None:
    whole_BS = torch.arange(2 * 8, dtype=torch.float32).view(2, 8)
    for rank, (gathered_BS, grad_Bl) in enumerate(run_ranks(2, gather_and_differentiate)):
        assert torch.equal(gathered_BS, whole_BS)
        assert torch.equal(grad_Bl, 2 * take(whole_BS, 2, rank))


def answers(layout: Layout) -> tuple[Tensor, float]:
    engine = build(layout, Training(), distributed.start())
    batch = shares(batch_of(0), engine.dp_rank, engine.dp_size, 1)
    return engine.logprobs(batch[0]), engine.evaluate(batch, CausalLM()).loss.item()


@pytest.mark.parametrize("layout", [Layout(cp=3), Layout(cp=2, ring=True)], ids=["padded", "ring"])
def test_every_rank_has_the_log_probabilities_of_the_whole_sequences(layout: Layout) -> None:
    [(expected_BL, loss)] = run_ranks(1, answers, Layout())
    for found_BL, found in run_ranks(layout.world_size, answers, layout):
        torch.testing.assert_close(found_BL, expected_BL, rtol=0, atol=1e-5)
        assert found == pytest.approx(loss, abs=1e-6)


class Sent(TorchDispatchMode):
    """Elements that go into each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            sent = args[0] if isinstance(args[0], list) else [args[1]]
            self.elements[function._schema.name.removeprefix("c10d::")] += sum(t.numel() for t in sent)
        return function(*args, **(kwargs or {}))


def what_is_sent(ring: bool) -> dict[str, int]:
    with Sent() as sent:
        shared(ring, torch.bfloat16, True)
    return {name: count for name, count in sent.elements.items() if name != "recv_"}


def test_ranks_send_what_the_table_says() -> None:
    own, ranks = 2 * 2 * LENGTH // 4 * KV_HEADS * FEATURES, 4
    assert (
        run_ranks(ranks, what_is_sent, False) == [{"_allgather_base_": own, "_reduce_scatter_base_": ranks * own}] * 4
    )
    assert run_ranks(ranks, what_is_sent, True) == [{"send": (2 * (ranks - 1) + ranks) * own}] * 4
