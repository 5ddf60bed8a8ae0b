"""Megatron-Core on a CPU: the explicit mode `engine.cpu=true`, for tests and for looking at a small run.

Megatron asks CUDA for the current device and for random states, and names CUDA where it makes tensors. While `on_cpu()`
is entered, the CPU answers. This module is imported in that mode only, never where there is a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CpuForCuda(TorchFunctionMode):
    """Tensors that are made on CUDA are made on the CPU; those that say what they are say that they are on CUDA."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1:  # by this name Megatron tells what it may shard
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The CPU has done what it was told."""


def _random_state(*args: Any, **kwargs: Any) -> Tensor:
    return torch.get_rng_state()


def _set_random_state(state: Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    kept = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Everything of Megatron that is called in here computes on the CPU."""
    from megatron.core.tensor_parallel import random

    with (
        _replaced(torch.cuda, current_device=lambda: CPU, synchronize=_nothing),
        _replaced(torch.cuda, get_rng_state=_random_state, manual_seed=torch.manual_seed),
        _replaced(random, _get_cuda_rng_state=_random_state, _set_cuda_rng_state=_set_random_state),
        _CpuForCuda(),
    ):
        yield
