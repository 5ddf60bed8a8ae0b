"""Tensor parallelism beyond parity: what each rank holds, and sequences that do not divide."""

from dataclasses import replace

import pytest
import torch

from parallel import distributed
from parallel.layout import Layout
from parallel.reduce import local_of
from parallel.tensor import rows_before
from tests.ranks import run_ranks
from tools.parity import MODEL, VOCABULARY, Training, batch_of, build
from train.objectives.clm import CausalLM


def test_rows_are_dealt_out_as_torch_chunks_them() -> None:
    for rows in (5, 7, 97, 98):
        for ranks in (2, 3, 4, 8):
            sizes = [len(part) for part in torch.arange(rows).chunk(ranks)]
            expected = [min(rows, sum(sizes[:rank])) for rank in range(ranks)]
            assert [rows_before(rows, ranks, rank) for rank in range(ranks)] == expected


def shapes(layout: Layout) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    engine = build(layout, Training(model=replace(MODEL, layers=1)), distributed.start())
    return {
        name.removeprefix("model.model."): (tuple(t.shape), tuple(local_of(t).shape))
        for name, t in engine.state().items()
        if name.startswith("model.")
    }


def test_a_rank_holds_its_heads_features_and_rows() -> None:
    first, *_, last = run_ranks(4, shapes, Layout(tp=4))
    assert first["embed_tokens.weight"] == ((VOCABULARY, 64), (25, 64))
    assert last["embed_tokens.weight"] == ((VOCABULARY, 64), (22, 64))
    block = "layers.0."
    assert first[block + "self_attn.q_proj.weight"] == ((64, 64), (16, 64))
    assert first[block + "self_attn.k_proj.weight"] == ((32, 64), (32, 64))  # two heads for four ranks: all hold both
    assert first[block + "self_attn.o_proj.weight"] == ((64, 64), (64, 16))
    assert first[block + "mlp.up_proj.weight"] == ((160, 64), (40, 64))
    assert first[block + "mlp.down_proj.weight"] == ((64, 160), (64, 40))
    assert first[block + "input_layernorm.weight"] == ((64,), (64,))


def test_no_parameter_is_shared_twice_along_one_dim() -> None:
    held = run_ranks(4, shapes, Layout(dp_shard=2, tp=2, zero=3))[0]
    assert held["layers.0.mlp.up_proj.weight"] == ((160, 64), (80, 32))
    assert held["layers.0.mlp.down_proj.weight"] == ((64, 160), (32, 80))


def losses(layout: Layout) -> list[float]:
    engine = build(layout, Training(model=replace(MODEL, layers=1)), distributed.start())
    found = []
    for step in range(2):
        batch = batch_of(step)
        odd = {n: getattr(batch, n)[:, :29] for n in ("tokens_BL", "labels_BL", "positions_BL", "documents_BL")}
        found.append(engine.train_step([replace(batch, **odd)], CausalLM(), 1.0).loss.item())
        found.append(float(engine.logprobs(replace(batch, **odd)).sum()))
    return found


def test_sequences_are_padded_to_a_length_that_the_ranks_can_share() -> None:
    [expected] = run_ranks(1, losses, Layout())
    for found in run_ranks(2, losses, Layout(tp=2)):
        assert found == pytest.approx(expected, rel=1e-6)
