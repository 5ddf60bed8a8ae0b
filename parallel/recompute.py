"""Activations that are computed again in the backward pass instead of being kept (Chen et al. 2016, arXiv:1604.06174).

    how          kept of a block                                        computed twice
    full         its input                                              everything
    selective    also the results of matrix products, of attention      what is cheap: norms, activations, rotations,
                 and of collectives (Korthikanti et al. 2022,           dropout, sums
                 arXiv:2205.05198, section 5)
    0.25, ...    of that share of the blocks, evenly spread, the input  these blocks; the others keep all they need

What is computed again is what was computed before, to the bit: dropout is a function of keys, and a sum is added up in
the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from parallel import linear

EXPENSIVE = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_dot_product")
"""Beginnings of the names of PyTorch's own operators whose results `selective` keeps."""

KEPT_NAMESPACES = ("longrun", "flash_attn", "_c10d_functional")
"""Of others, all results are kept: attention kernels, collectives."""

_recomputing = False


def recomputing() -> bool:
    """Whether this forward pass is one of the backward pass: what counts or draws must do nothing then."""
    return _recomputing


def recompute(blocks: Sequence[nn.Module], how: str) -> None:
    """Change blocks in place so that they keep less; after whatever else changes how they compute, before they are
    compiled and sharded.

    Args:
        blocks: of a model, or of a part of it.
        how: a value of `Layout.recompute`.
    """
    if how == "none":
        return
    chosen = blocks if how in ("full", "selective") else spread(blocks, float(how))
    for block in chosen:
        block.forward = _Recomputed(block.forward, selective=how == "selective")


def spread(blocks: Sequence[nn.Module], share: float) -> list[nn.Module]:
    """That share of the blocks, at least one, as evenly over the depth as can be."""
    count = max(1, round(share * len(blocks)))
    return [b for i, b in enumerate(blocks) if (i + 1) * count // len(blocks) > i * count // len(blocks)]


class _Recomputed:
    """A forward that runs again when its backward pass begins."""

    def __init__(self, forward: Callable[..., Any], selective: bool):
        self.forward = forward
        self.inner = _selective if selective else noop_context_fn

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*arguments, **options)
        options |= {"use_reentrant": False, "preserve_rng_state": False}
        if not torch.compiler.is_compiling():
            options["context_fn"] = partial(_contexts, self.inner)
        elif self.inner is _selective:  # a compiler repeats operators, not Python: its graph does not ask when it is
            options["context_fn"] = _selective
        return checkpoint(self.forward, *arguments, **options)


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def _selective() -> Contexts:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = True  # what is no operator of a library is a kernel of attention
    if isinstance(operator, OpOverload):
        kept = operator.namespace in KEPT_NAMESPACES and operator._opname != "wait_tensor"
        kept |= operator.namespace == "aten" and operator._opname.startswith(EXPENSIVE)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(inner: Callable[[], Contexts]) -> Contexts:
    """Those of the forward pass and of its repetition, which saves what was saved then: it defers where that did."""
    first, again = inner()
    return first, _again(again, linear.deferring() if linear.is_deferring() else nullcontext())


@contextmanager
def _again(*inner: AbstractContextManager[Any]) -> Iterator[None]:
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        with inner[0], inner[1]:
            yield
    finally:
        _recomputing = before
