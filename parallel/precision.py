"""What is computed in bfloat16. Master weights, moments and reductions are fp32 always."""

import torch
import torch.distributed as dist

from conf.errors import LongrunError

PRECISIONS = ("auto", "bf16", "fp32")


class PrecisionError(LongrunError):
    """No such compute precision."""


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than fp32 ones on this device: hardware does them, nothing emulates."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


NO_FP8 = "needs a GPU of compute capability 8.9 or more (L4, L40, H100, ...); use bf16 or auto"


def has_fp8(device: torch.device) -> bool:
    """Whether the device has products in 8-bit floating point."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations in forward and backward, the same on every rank.

    Args:
        precision: "auto" (bf16 where every rank's device has it natively, else fp32), "bf16", "fp32", or "fp8": bf16
            around products in 8 bits.
        device: where this rank computes.

    Raises:
        PrecisionError: another word, or a device without products in 8 bits.
    """
    if precision == "fp8":
        if not has_fp8(device):
            raise PrecisionError(f"stage.precision=fp8 {NO_FP8}.")
        return torch.bfloat16
    if precision not in PRECISIONS:
        raise PrecisionError(f"precision={precision!r}: one of {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    native = torch.tensor(int(has_native_bf16(device)), device=device)
    dist.all_reduce(native, op=dist.ReduceOp.MIN)
    return torch.bfloat16 if native.item() else torch.float32
