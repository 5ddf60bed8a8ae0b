"""Same layout, same bits: what must be set for that, once per process."""

import os

import torch

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS,NVLSTree",
}
"""Without its own workspace cuBLAS splits sums as it finds memory; NVLink switches add up in the order of arrival."""


def enforce() -> None:
    """Allow deterministic kernels only; others raise. To be called before the process group is made, whose
    communicators read the environment; what the user set there stays."""
    import torch._inductor.config as inductor

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    inductor.deterministic = True  # kernels are chosen by rule, not by how fast they were this time
