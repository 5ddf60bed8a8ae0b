"""Matrix products in 8-bit floating point (Micikevicius et al. 2022, arXiv:2209.05433), through torchao: inputs,
weights and gradients are scaled by their largest element, one scale each; products are added up in higher precision.
"""

from collections.abc import Iterable

from torch import nn

from parallel.precision import PrecisionError

MULTIPLE = 16
"""Both dimensions of a product in 8 bits are multiples of it."""


def fits(module: nn.Module, name: str) -> bool:
    """Whether a module of a block is a linear layer that 8 bits suit: all but those of odd sizes, and gates, whose few
    outputs decide too much."""
    if not isinstance(module, nn.Linear) or name.endswith("_gate"):
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def convert(blocks: Iterable[nn.Module], emulate: bool = False) -> None:
    """Let the linear layers of blocks compute in 8 bits; before anything wraps or shards them. Parameters stay.

    Args:
        blocks: of a model; head and embedding are none of them.
        emulate: round to 8 bits, compute in fp32: for tests.

    Raises:
        PrecisionError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise PrecisionError(
            f"stage.precision=fp8 needs the package torchao, which does not import here ({error}): install it with "
            "pip install 'longrun[gpu]', or use stage.precision=bf16."
        ) from error
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate))
