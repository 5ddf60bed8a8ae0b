"""The safetensors format, written front to back: a header that says where each tensor is, then their bytes.

https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """The first bytes of a file: the length of a JSON object, and that object.

    Args:
        tensors: name -> dtype and shape, in the order in which their bytes will follow.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    return len(text).to_bytes(8, "little") + text


def data(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; of itself, where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
