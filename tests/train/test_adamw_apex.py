"""apex's FusedAdam: that it is found, told from its namesake, and called as it must be. Its kernel itself needs a GPU,
so here a model of it stands in its place."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.optim.adamw import AdamW
from train.optim.adamw_apex import AdamWApex, ApexError


def multi_tensor_adam_capturable(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    decay: float,
    inverse: Tensor,
) -> None:
    """What apex's csrc/multi_tensor_adam.cu does in its mode 1, with the types it asks for."""
    assert (noop.dtype, lr.dtype, step.dtype, inverse.dtype) == (torch.int, torch.float, torch.int, torch.float)
    assert (mode, bias_correction) == (1, 1)
    if noop.item() == 1:
        return
    for gradient, weight, mean, square in zip(*lists, strict=True):
        assert weight.is_contiguous() and weight.numel()
        gradient.mul_(inverse)
        mean.copy_(beta1 * mean + (1 - beta1) * gradient)
        square.copy_(beta2 * square + (1 - beta2) * gradient.square())
        root = (square / (1 - beta2**step)).sqrt() + epsilon
        weight.sub_(lr * (mean / (1 - beta1**step) / root + decay * weight))


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """An apex whose kernel runs on the CPU."""
    package, applying, extension = ModuleType("apex"), ModuleType("apex.multi_tensor_apply"), ModuleType("amp_C")
    applying.multi_tensor_applier = lambda op, noop, lists, *more: op(65536, noop, lists, *more)  # type: ignore[attr-defined]
    extension.multi_tensor_adam_capturable = multi_tensor_adam_capturable  # type: ignore[attr-defined]
    for module in (package, applying, extension):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def trained(option: Any, skip: bool = False) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    model = nn.Linear(6, 5)
    for number, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    optimizer = option.build(model)
    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)) * 8
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(step in (0, 2) and skip))
        optimizer.step()
    return list(model.parameters()), [optimizer.state[p] for p in model.parameters()]


@pytest.mark.parametrize("skip", [False, True])
def test_steps_and_state_are_those_of_torchs_adamw(apex: None, skip: bool) -> None:
    weights, states = trained(AdamWApex(lr=1e-2, weight_decay=0.3), skip)
    expected_weights, expected_states = trained(AdamW(lr=1e-2, weight_decay=0.3), skip)
    for weight, expected in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(weight, expected)
    for state, expected in zip(states, expected_states, strict=True):
        torch.testing.assert_close(state, dict(expected))


def test_a_part_without_elements_is_kept_from_the_kernel(apex: None) -> None:
    model = nn.ParameterList([torch.ones(3, 2), torch.ones(0, 2)])
    optimizer = AdamWApex().build(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [optimizer.state[parameter]["step"].item() for parameter in model.parameters()] == [1.0, 1.0]


def problems(dry_run: bool = False) -> list[str]:
    return [str(problem) for problem in AdamWApex().problems(SimpleNamespace(dry_run=dry_run), 1)]  # type: ignore[arg-type]


def test_an_apex_that_is_missing_is_named_before_anything_starts() -> None:
    [problem] = problems()
    assert "optim=adamw_apex: NVIDIA's apex is not installed" in problem and "optim=adamw" in problem
    assert problems(dry_run=True) == []
    with pytest.raises(ApexError, match="unrelated package"):
        AdamWApex().build(nn.Linear(2, 2))


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing `name` fails."""
    monkeypatch.setitem(sys.modules, name, None)


def test_another_package_called_apex_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        [problem] = problems()
    finally:
        sys.modules.pop("apex", None)
    assert f"{tmp_path}/apex/__init__.py is not NVIDIA's" in problem


def test_an_apex_without_extensions_or_without_a_gpu_is_named(apex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "need a CUDA device" in problems()[0]
    without("amp_C", monkeypatch)
    assert "without its C++ and CUDA extensions (module amp_C)" in problems()[0]
