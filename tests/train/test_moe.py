"""Experts: what a token gets from them, and how they are kept evenly loaded."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import IGNORED, MicroBatch, PreferenceBatch
from train.models.attention import Visibility
from train.models.moe import MixtureOfExperts, MoE, token_weights
from train.models.transformer import Context, DecoderConfig, initialise
from train.objectives.clm import CausalLM
from train.objectives.dpo import DPO

HIDDEN = 12
CONFIG = MoE(experts=5, active=2, intermediate=8)
EVERYTHING = replace(CONFIG, shared=6, shared_gate=True, scoring="sigmoid", scale=1.5, selection_bias=True)
VOCABULARY = 61
DECODER = DecoderConfig(layers=2, hidden=16, heads=2, kv_heads=1, head_dim=8, moe=CONFIG)


def built(config: MoE = CONFIG) -> MixtureOfExperts:
    torch.manual_seed(0)
    layer = MixtureOfExperts(config, HIDDEN).double()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.normal_(0, 0.5)
        layer.gate.seen.zero_()
    return layer


def context(token_weights_BL: Tensor | None = None) -> Context:
    nothing = torch.empty(0)
    return Context((nothing, nothing), Visibility(causal=True), nothing, token_weights_BL)


def one_by_one(layer: MixtureOfExperts, x_BLN: Tensor) -> Tensor:
    """Each token by itself, as the papers have it."""
    config, experts = layer.gate.config, layer.experts
    out = []
    for x_N in x_BLN.flatten(0, 1):
        logits_E = layer.gate.weight.float() @ x_N.float()
        scores_E = logits_E.softmax(0) if config.scoring == "softmax" else logits_E.sigmoid()
        bias_E = layer.gate.e_score_correction_bias
        chosen = (scores_E if bias_E is None else scores_E + bias_E).argsort(descending=True)[: config.active]
        total = scores_E[chosen].sum() if config.normalise else 1.0
        y_N = torch.zeros_like(x_N)
        for e in chosen.tolist():
            fed_F = F.silu(experts.gate_proj[e] @ x_N) * (experts.up_proj[e] @ x_N)
            y_N = y_N + config.scale * scores_E[e] / total * (experts.down_proj[e] @ fed_F)
        if layer.shared_expert is not None:
            shared_N = layer.shared_expert(x_N, context())
            y_N = y_N + (shared_N * layer.shared_expert_gate(x_N).sigmoid() if layer.shared_expert_gate else shared_N)
        out.append(y_N)
    return torch.stack(out).view_as(x_BLN)


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, normalise=False), replace(CONFIG, active=1), replace(CONFIG, active=5), EVERYTHING],
    ids=["mixtral", "unnormalised", "one", "all", "everything"],
)
def test_every_token_gets_the_weighted_sum_of_its_experts(config):
    layer = built(config)
    x_BLN = torch.randn(3, 7, HIDDEN, dtype=torch.float64, requires_grad=True)
    found_BLN, expected_BLN = layer(x_BLN, context()), one_by_one(layer, x_BLN)
    torch.testing.assert_close(found_BLN, expected_BLN, rtol=1e-5, atol=1e-6)
    tensors = [x_BLN, *layer.parameters()]
    weights_BLN = torch.randn_like(found_BLN)
    found, expected = (torch.autograd.grad(y, tensors, weights_BLN) for y in (found_BLN, expected_BLN))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_token_is_dropped_where_all_choose_the_same_experts():
    layer = built(replace(CONFIG, selection_bias=True))
    with torch.no_grad():
        layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 0, 9, 0, 0]))
    x_BLN = torch.randn(2, 30, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(layer(x_BLN, context()), one_by_one(layer, x_BLN), rtol=1e-5, atol=1e-6)


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    layer = built(replace(CONFIG, active=1))
    layer(torch.randn(1, 1, HIDDEN, dtype=torch.float64), context()).sum().backward()
    touched_E = layer.experts.down_proj.grad.flatten(1).any(-1)
    assert touched_E.sum() == 1


def losses(layer: MixtureOfExperts, x_BLN: Tensor, token_weights_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Balance loss and squared log-sum-exp by their formulas, sequence by sequence."""
    config = layer.gate.config
    balance = squares = torch.zeros(())
    for x_LN, weights_L in zip(x_BLN, token_weights_BL, strict=True):
        real_LN, weight = x_LN[weights_L > 0], weights_L.sum()
        logits_LE = real_LN.float() @ layer.gate.weight.float().T
        scores_LE = logits_LE.softmax(-1) if config.scoring == "softmax" else logits_LE.sigmoid()
        bias_E = layer.gate.e_score_correction_bias
        chosen_LK = (scores_LE if bias_E is None else scores_LE + bias_E).topk(config.active).indices
        share_E = F.one_hot(chosen_LK, config.experts).sum((0, 1)) / chosen_LK.numel()
        probability_E = (scores_LE / scores_LE.sum(-1, keepdim=True)).mean(0)
        balance = balance + weight * config.experts * (share_E * probability_E).sum()
        squares = squares + weight * logits_LE.logsumexp(-1).square().mean()
    return balance, squares


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING], ids=["softmax", "sigmoid"])
def test_attached_losses_have_the_gradient_of_their_formulas(config):
    layer = built(replace(config, balance_loss=0.3, z_loss=0.2))
    x_BLN = torch.randn(3, 9, HIDDEN, dtype=torch.float64)
    documents_BL = torch.tensor([[0] * 9, [0] * 4 + [1] * 2 + [-1] * 3, [0] * 8 + [-1]])
    weights_BL = token_weights(documents_BL, documents_BL, torch.tensor([5.0, 1.0, 2.0]))
    plain, attached = ([p for p in layer.gate.parameters()] for _ in range(2))
    balance, squares = losses(layer, x_BLN, weights_BL)
    [expected] = torch.autograd.grad(layer(x_BLN, context()).sum() + 0.3 * balance + 0.2 * squares, plain)
    [found] = torch.autograd.grad(layer(x_BLN, context(weights_BL)).sum(), attached)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    layer.gate.seen.zero_()
    layer(x_BLN, context(weights_BL))
    *counts, seen_balance, seen_squares, weight = layer.gate.statistics().tolist()
    assert sum(counts) == config.active * (9 + 6 + 8)
    assert (seen_balance, seen_squares) == pytest.approx((balance.item(), squares.item()), rel=1e-5)
    assert weight == pytest.approx(8.0)
    assert not layer.gate.statistics().any()


def test_an_even_load_has_a_balance_loss_of_one():
    layer = built(replace(CONFIG, experts=4, active=1))
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(4, HIDDEN))
    x_BLN = torch.eye(4, HIDDEN, dtype=torch.float64)[None] * 1e-6
    layer(x_BLN, context(torch.full((1, 4), 0.25)))
    metrics = layer.gate.settle(layer.gate.statistics(), torch.ones(()))
    assert metrics["balance_loss"].item() == pytest.approx(1.0)
    assert [metrics[f"expert_load_{name}"].item() for name in ("max", "min", "cv")] == [1.0, 1.0, 0.0]


def test_the_losses_are_the_same_however_sequences_are_dealt_out():
    x_BLN = torch.randn(4, 6, HIDDEN, dtype=torch.float64)
    weights_BL = torch.rand(4, 6)
    gradients, seen = [], []
    for parts in (1, 2, 4):
        layer = built()
        for x, weights in zip(x_BLN.chunk(parts), weights_BL.chunk(parts), strict=True):
            layer(x, context(weights)).sum().backward()
        gradients.append(layer.gate.weight.grad)
        seen.append(layer.gate.statistics())
    for gradient, statistics in zip(gradients, seen, strict=True):
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics, seen[0], rtol=1e-6, atol=0)


def test_padding_and_evaluation_leave_no_trace():
    layer = built()
    x_BLN = torch.randn(1, 6, HIDDEN, dtype=torch.float64)
    documents_BL = torch.tensor([[0, 0, 0, -1, -1, -1]])
    weights_BL = token_weights(documents_BL, documents_BL, torch.ones(1))
    layer(x_BLN, context(weights_BL)).sum()
    padded = layer.gate.statistics()
    layer(x_BLN[:, :3], context(weights_BL[:, :3]))
    torch.testing.assert_close(padded, layer.gate.statistics())
    layer.eval()(x_BLN, context(weights_BL))
    assert not layer.gate.statistics().any()


def test_a_bias_rises_where_load_is_low_and_stays_where_the_step_is_skipped():
    gate = built(replace(CONFIG, selection_bias=True, bias_rate=0.25)).gate
    gate.e_score_correction_bias.zero_()
    totals = torch.tensor([10.0, 30, 20, 0, 40, 1, 1, 1])
    gate.settle(totals, torch.zeros(()))
    assert not gate.e_score_correction_bias.any()
    gate.settle(totals, torch.ones(()))
    assert gate.e_score_correction_bias.tolist() == [0.25, -0.25, 0.0, 0.25, -0.25]


def test_biases_even_out_a_skewed_load():
    config = replace(CONFIG, selection_bias=True, bias_rate=0.02)
    layer = built(config)
    layer.gate.e_score_correction_bias.zero_()
    x_BLN = torch.randn(2, 200, HIDDEN, dtype=torch.float64) + 1.0
    spread = []
    for _ in range(60):
        layer(x_BLN, context(torch.full((2, 200), 1 / 200)))
        spread.append(layer.gate.settle(layer.gate.statistics(), torch.ones(()))["expert_load_cv"].item())
    assert spread[-1] < 0.15 < 0.4 < spread[0]


def test_what_a_sequence_weighs_adds_up_to_what_the_loss_does():
    labels_BL = torch.tensor([[1, 2, IGNORED], [IGNORED, IGNORED, 3]])
    fields: dict[str, Any] = dict.fromkeys(("tokens_BL", "positions_BL", "documents_BL"), torch.zeros(2, 3).long())
    batch = MicroBatch(labels_BL=labels_BL, samples_B=torch.arange(2), **fields)
    assert CausalLM().sequence_weights(batch).tolist() == [2.0, 1.0]
    pair = PreferenceBatch(
        labels_BL=labels_BL, samples_B=torch.arange(2), reference_logprobs_B=torch.zeros(2), **fields
    )
    assert DPO().sequence_weights(pair).sum() == pair.pairs


def test_a_decoder_with_experts_learns_and_can_begin_with_dense_layers():
    config = replace(DECODER, layers=3, moe=replace(CONFIG, first=1))
    model = config.build(VOCABULARY)
    initialise(model, 0)
    assert [isinstance(block.mlp, MixtureOfExperts) for block in model.blocks] == [False, True, True]
    tokens_BL = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(20):
        logprobs_BL = model(*inputs(tokens_BL), tokens_BL.roll(-1, 1), sequence_weights_B=torch.full((4,), 16.0))
        (-logprobs_BL.sum() / 64).backward()
        seen.append(logprobs_BL.mean().item())
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1] > seen[0] + 1.0


def inputs(tokens_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tokens_BL, torch.arange(tokens_BL.shape[1]).expand_as(tokens_BL), torch.zeros_like(tokens_BL)


def test_a_meta_model_starts_with_the_same_weights_and_empty_buffers():
    config = replace(DECODER, moe=EVERYTHING)
    direct = config.build(VOCABULARY)
    initialise(direct, 7)
    with torch.device("meta"):
        late = config.build(VOCABULARY)
    late.to_empty(device="cpu")
    initialise(late, 7)
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), late.parameters(), strict=True))
    assert all(not buffer.any() for buffer in late.buffers())


def test_standard_deviations_of_experts_are_those_of_other_matrices():
    config = DecoderConfig(layers=8, hidden=64, moe=MoE(experts=16, intermediate=64))
    model = config.build(VOCABULARY)
    initialise(model, 0)
    experts = model.blocks[3].mlp.experts
    assert experts.up_proj.std().item() == pytest.approx(0.02, rel=0.02)
    assert experts.down_proj.std().item() == pytest.approx(0.02 / 4, rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "keys"),
    [
        ({"active": 6}, {"active"}),
        ({"experts": -1}, {"experts", "every"}),
        (
            {"intermediate": 0, "scale": 0.0, "scoring": "relu", "z_loss": -1.0},
            {"intermediate", "scale", "scoring", "z_loss"},
        ),
        ({"shared_gate": True, "first": 2}, {"shared_gate", "first"}),
        ({"every": 3}, {"every"}),
        ({"experts": 0, "active": 9}, set()),
    ],
)
def test_all_problems_of_the_experts_are_listed(wrong, keys):
    config = replace(DECODER, moe=replace(CONFIG, **wrong))
    assert {problem.key for problem in config.problems(None, 1)} == {f"model.moe.{key}" for key in keys}
