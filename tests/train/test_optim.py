"""AdamW and Muon: which parameter is treated how, and that an update can be scaled and skipped on the device."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tools.parity import MODEL, VOCABULARY
from train.models.transformer import Decoder, initialise
from train.optim.adam8bit import Adam8bit
from train.optim.adamw import AdamW, split_by_decay
from train.optim.muon import Muon, orthogonalise

UNTIED = replace(MODEL, layers=2, tied=False, qkv_bias=True, qk_norm=True)


def model_with_gradients(scale: float = 1.0) -> Decoder:
    model = UNTIED.build(VOCABULARY)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return model


def step(option: Any, model: Decoder, scale: float = 1.0, skip: bool = False, times: int = 2) -> torch.optim.Optimizer:
    optimizer = option.build(model)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(skip))
    gradients = [p.grad.clone() for p in model.parameters()]
    for _ in range(times):
        optimizer.step()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()  # a fused kernel unscales it in place
    return optimizer


def test_norms_biases_and_embeddings_are_not_decayed() -> None:
    decayed, others = split_by_decay(UNTIED.build(VOCABULARY))
    assert all(name.endswith("proj.weight") or name == "lm_head.weight" for name in decayed)
    assert all("norm" in name or name.endswith("bias") or "embed" in name for name in others)
    assert len(decayed) == 2 * 7 + 1
    tied, _ = split_by_decay(MODEL.build(VOCABULARY))
    assert "model.embed_tokens.weight" not in tied


def test_frozen_parameters_are_left_out() -> None:
    model = UNTIED.build(VOCABULARY)
    model.model.embed_tokens.weight.requires_grad_(False)
    held = {id(p) for group in AdamW().build(model).param_groups for p in group["params"]}
    assert id(model.model.embed_tokens.weight) not in held
    assert len(held) == len(list(model.parameters())) - 1


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = model_with_gradients()
    optimizer = step(Muon(), model)
    kinds = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    matrices = {name for name, moments in kinds.items() if moments == {"momentum_buffer"}}
    assert matrices == {n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    assert all(kinds[n] == {"step", "exp_avg", "exp_avg_sq"} for n in kinds.keys() - matrices)


def parts_of_a_pipeline() -> nn.ModuleList:
    """Two parts of one model, each with its own layers only, as one rank may hold them."""
    parts = [UNTIED.build(VOCABULARY), UNTIED.build(VOCABULARY)]
    parts[0].model.layers[1] = parts[1].model.layers[0] = None  # type: ignore[assignment]
    parts[0].model.norm = parts[0].lm_head = parts[1].model.embed_tokens = None  # type: ignore[assignment]
    return nn.ModuleList(parts)


@pytest.mark.parametrize("option", [AdamW(), Adam8bit(), Muon()])
def test_parts_of_a_pipeline_are_grouped_as_the_whole_model_is(option: Any) -> None:
    names = {}
    for model in (UNTIED.build(VOCABULARY), parts_of_a_pipeline()):
        named = {id(p): name for name, p in model.named_parameters()}
        groups = [[named[id(p)] for p in group["params"]] for group in option.build(model).param_groups]
        names[type(model)] = [{name.removeprefix("0.").removeprefix("1.") for name in group} for group in groups]
    assert names[Decoder] == names[nn.ModuleList]


def test_stacked_experts_are_updated_one_by_one() -> None:
    stacked, apart = nn.Module(), nn.Module()
    weights_EFN = torch.randn(3, 6, 4)
    experts = nn.Module()
    experts.weight, experts.bias = nn.Parameter(weights_EFN.clone()), nn.Parameter(torch.zeros(3, 6))
    stacked.blocks = nn.ModuleList([experts])
    apart.blocks = nn.ModuleList(nn.Linear(4, 6, bias=False) for _ in range(3))
    optimizers = [Muon(precision="fp32").build(model) for model in (stacked, apart)]
    for linear, weight_FN in zip(apart.blocks, weights_EFN, strict=True):
        linear.weight.data.copy_(weight_FN)
    for step in range(3):
        gradient_EFN = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(step))
        experts.weight.grad = gradient_EFN
        for linear, gradient_FN in zip(apart.blocks, gradient_EFN, strict=True):
            linear.weight.grad = gradient_FN
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(experts.weight, torch.stack([linear.weight for linear in apart.blocks]))
    assert id(experts.bias) in {id(p) for p in optimizers[0].param_groups[-1]["params"]}  # AdamW's, not decayed


@pytest.mark.parametrize("option", [AdamW(lr=1e-2), Adam8bit(lr=1e-2), Muon(lr=1e-2, precision="fp32")])
def test_gradients_are_divided_by_the_scale_inside_the_step(option: Any) -> None:
    plain, scaled = model_with_gradients(), model_with_gradients(scale=64.0)
    step(option, plain)
    step(option, scaled, scale=64.0)
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("option", [AdamW(lr=1e-2), Adam8bit(lr=1e-2), Muon(lr=1e-2)])
def test_a_skipped_step_leaves_parameters_and_moments_even_with_nan_gradients(option: Any) -> None:
    model = model_with_gradients()
    optimizer = step(option, model, times=1)
    state = {(p, key): value.clone() for p in model.parameters() for key, value in optimizer.state[p].items()}
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(value, optimizer.state[p][key]) for (p, key), value in state.items())


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_orthogonalising_brings_singular_values_near_1_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64))
    matrix_MN = left * torch.logspace(0, -2, min(shape), dtype=torch.float64) @ right.T
    found_MN = orthogonalise(matrix_MN, 5, torch.float64)
    within = left.T @ found_MN @ right
    assert (within - torch.diag(within.diagonal())).abs().max() < 1e-6
    assert within.diagonal().min() > 0.5
    assert within.diagonal().max() < 1.3


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalise(torch.zeros(4, 6), 5, torch.bfloat16).any()


def test_muons_updates_have_the_size_of_adamws() -> None:
    for shape in ((64, 64), (64, 256), (256, 64)):
        block = nn.Linear(shape[1], shape[0], bias=False)
        model = nn.Module()
        model.blocks = nn.ModuleList([block])
        before = block.weight.detach().clone()
        block.weight.grad = torch.randn(shape)
        Muon(lr=1e-2, weight_decay=0.0, precision="fp32").build(model).step()
        size = (block.weight - before).square().mean().sqrt().item()
        assert 0.12 < size / 1e-2 < 0.28  # AdamW's are 0.2 to 0.4 of the rate (Liu et al. 2025, section 2.2)


@pytest.mark.parametrize(
    ("option", "keys"),
    [
        (AdamW(lr=0.0, beta1=1.0, beta2=-0.1, eps=0.0, weight_decay=-1.0), "lr beta1 beta2 eps weight_decay"),
        (
            Muon(adam_lr=0.0, momentum=1.0, iterations=0, scale="x", precision="fp8"),
            "adam_lr momentum iterations scale precision",
        ),
        (AdamW(), ""),
        (Muon(), ""),
    ],
)
def test_values_out_of_range_are_all_named(option: Any, keys: str) -> None:
    assert [p.key for p in option.problems(None, 1)] == [f"optim.{key}" for key in keys.split()]
