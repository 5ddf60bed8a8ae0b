"""Fingerprints tell every small change; replicas that differ are found on every layout, and named where most agree."""

import pickle
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import distributed
from parallel.checksums import Checksums, Replicas, outvoted
from parallel.engine import Settings
from parallel.engines.native import Native
from parallel.layout import Layout
from parallel.reduce import local_of
from tests.ranks import run_ranks
from tools.parity import ADAMW, MODEL, VOCABULARY, batch_of, shares
from train.models.transformer import initialise
from train.objectives.clm import CausalLM

CPU = torch.device("cpu")
SIZES = (1, 2, 511, 4099, 70_001)


def sum_of(*tensors: Tensor) -> list[int]:
    return Checksums(CPU).of(tensors).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_every_bit_of_every_kind_of_element_counts(dtype):
    dice = random.Random(0)
    for size in SIZES:
        values = torch.randint(0, 100, (size,)).to(dtype)
        before = sum_of(values)
        for _ in range(100):
            changed = values.clone()
            changed.view(torch.uint8)[dice.randrange(values.nbytes)] ^= 1 << dice.randrange(8)
            assert sum_of(changed) != before
        assert sum_of(values.clone()) == before


def test_elements_that_change_places_or_signs_in_pairs_are_seen():
    dice = random.Random(0)
    for size in SIZES[2:]:
        values = torch.randn(size)
        before = sum_of(values)
        for _ in range(100):
            one, other = dice.sample(range(size), 2)
            swapped, negated = values.clone(), values.clone()
            swapped[[one, other]] = values[[other, one]]
            negated[[one, other]] = -values[[one, other]]
            assert before not in (sum_of(swapped), sum_of(negated))


def test_a_part_of_a_tensor_has_the_sum_of_a_tensor_of_its_own():
    whole = torch.randn(3000)
    for start in range(3):  # words begin at multiples of their size, elements need not
        part = whole[start : start + 2001]
        assert sum_of(part, whole[::2]) == sum_of(part.clone(), whole[::2].clone())


def test_the_ranks_that_most_do_not_agree_with_are_named_and_all_where_there_is_no_majority():
    assert outvoted({0: 5, 3: 5}) == []
    assert outvoted({0: 5, 1: 5, 2: 6, 7: 5}) == [2]
    assert outvoted({0: 5, 1: 6}) == [0, 1]
    assert outvoted({0: 5, 1: 5, 2: 6, 3: 6}) == [0, 1, 2, 3]
    assert outvoted({0: 5, 1: 5, 2: 6, 3: 7}) == [2, 3]


LAYOUTS = {
    "replicated": (Layout(dp_shard=2), "model.norm.weight"),
    "replicas of shards": (Layout(dp_replicate=2, dp_shard=2, zero=2), "model.layers.0.mlp.up_proj.weight"),
    "norms of tensor ranks": (Layout(tp=2), "model.norm.weight"),
    "the embedding at both ends of a pipeline": (Layout(pp=2, micro_batches=2), "model.embed_tokens.weight"),
}


def disturbed(layout: Layout, name: str) -> tuple[list, list, list[str], int]:
    """Sets of ranks that differ after two steps; after the last rank's second moment of one weight changed."""
    world = distributed.start()
    model = MODEL.build(VOCABULARY)
    initialise(model, 0)
    engine = Native().build(model, layout, ADAMW.build, world=world, settings=Settings(precision="fp32", ema=0.9))
    for step in range(2):
        engine.train_step(shares(batch_of(step), engine.dp_rank, engine.dp_size, layout.micro_batches), CausalLM(), 1.0)
    checksums, replicas = Checksums(CPU), Replicas(engine.state(), CPU)

    def differing() -> list:
        sums_RK: list[list[int]] = [[]] * world.size
        dist.all_gather_object(sums_RK, replicas.of(checksums.of(engine.state().values())).tolist())
        return replicas.differing(sums_RK)

    quiet = differing()
    if world.rank == world.size - 1:
        local_of(engine.state()[f"optimizer.{name}.exp_avg_sq"]).view(torch.int32).view(-1)[3] ^= 1
    found = differing()
    names = [name for kind in found for name in replicas.shared_names(kind)]
    return quiet, found, names, len(replicas.kinds)


@pytest.mark.parametrize("case", LAYOUTS)
def test_replicas_that_differ_in_one_bit_are_found_by_all_ranks(case):
    layout, name = LAYOUTS[case]
    ranks = layout.world_size
    told = run_ranks(ranks, disturbed, layout, name)
    holders = (1, 3) if ranks == 4 else (0, 1)
    for rank, (quiet, found, names, kinds) in enumerate(told):
        assert quiet == [] and found == [holders] and kinds
        assert (f"optimizer.{name}.exp_avg_sq" in names) == (rank in holders)


def test_of_many_ranks_that_have_the_same_names_no_names_are_exchanged(monkeypatch):
    told = []

    def gather(everyones, mine):
        told.append(mine)
        everyones[:] = [mine] * 1024

    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1024)
    monkeypatch.setattr(dist, "all_gather_object", gather)  # and nothing else
    state = {f"model.layers.{number}.mlp.up_proj.weight": torch.ones(1) for number in range(400)}
    began = time.process_time()
    replicas = Replicas(state, CPU)
    assert replicas.differing([[5]] * 1024) == [] and replicas.differing([[5]] * 1023 + [[4]]) == replicas.kinds
    assert time.process_time() - began < 0.5
    assert replicas.kinds == [tuple(range(1024))] and len(replicas.shared_names(replicas.kinds[0])) == 400
    assert len(pickle.dumps(told)) < 200
