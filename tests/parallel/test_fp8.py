"""8-bit products: which layers, how far off, and where they are refused."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from parallel.fp8 import convert, fits
from parallel.layout import Layout
from parallel.precision import PrecisionError, compute_dtype
from tools.parity.training import MODEL, batch_of
from train.models.moe import MoE
from train.models.transformer import Decoder, initialise
from train.stages.training import Training


def decoder() -> Decoder:
    model = replace(MODEL, tied=False).build(97)
    initialise(model, 0)
    return model


def test_linear_layers_of_even_sizes_are_converted_and_gates_are_not() -> None:
    assert fits(nn.Linear(32, 48), "q_proj")
    assert not fits(nn.Linear(32, 40), "q_proj")
    assert not fits(nn.Linear(32, 16), "mlp.shared_expert_gate")
    experts = replace(MODEL, moe=MoE(experts=4, active=2, intermediate=32)).build(97).blocks[0]
    assert not any(fits(module, name) for name, module in experts.mlp.named_modules())


def test_converted_blocks_have_the_same_parameters_and_nearly_the_same_answers() -> None:
    pytest.importorskip("torchao")
    exact, rounded = decoder(), decoder()
    convert(rounded.blocks, emulate=True)
    names = {name: p.shape for name, p in exact.named_parameters()}
    assert {name: p.shape for name, p in rounded.named_parameters()} == names
    kinds = {type(module).__name__ for module in rounded.blocks.modules()}
    assert "Float8Linear" in kinds
    assert "Linear" not in kinds
    assert type(rounded.lm_head) is nn.Linear
    batch = batch_of(0)
    fields = (batch.tokens_BL, batch.positions_BL, batch.documents_BL, batch.labels_BL)
    answers = [model(*fields) for model in (exact, rounded)]
    answers[1].sum().backward()
    assert all(p.grad is not None for p in rounded.parameters())
    assert 0 < (answers[0] - answers[1]).abs().max() < 0.05


def test_a_device_without_8_bits_is_refused() -> None:
    with pytest.raises(PrecisionError, match=r"fp8 needs a GPU of compute capability 8\.9 or more"):
        compute_dtype("fp8", torch.device("cpu"))


def test_without_torchao_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(PrecisionError, match=r"needs the package torchao.*longrun\[gpu\]"):
        convert(decoder().blocks)


def test_layouts_whose_linear_layers_are_their_own_are_refused_before_the_start() -> None:
    layout = Layout(tp=2, pp=2, schedule="zbv", virtual_stages=2)
    keys = [problem.key for problem in Training(precision="fp8")._fp8_problems(layout, dry_run=False)]
    assert {"parallel.tp", "parallel.schedule"} <= set(keys)
    assert torch.cuda.is_available() or keys[0] == "stage.precision"
    elsewhere = [problem.key for problem in Training(precision="fp8")._fp8_problems(layout, dry_run=True)]
    assert elsewhere == ["parallel.tp", "parallel.schedule"]
