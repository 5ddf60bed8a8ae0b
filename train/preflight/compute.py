"""Compute: how fast each rank multiplies matrices, all at once, and whether what comes out is right.

The matrices hold -1, 0 and 1, few enough that every product is a whole number below 2^8: exact in every precision and
order of summation. So C v = A (B v) must hold to the bit for a vector of ones (Freivalds 1977), which costs nothing
beside the product, and a core that computes wrongly shows without anybody to compare it with.

Shape suffixes: N rows and columns.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.preflight.base import Finding, Record, Site, by_host, slow_ranks, who

if TYPE_CHECKING:
    from train.preflight.limits import Preflight

SIZES = {"cuda": 8192, "cpu": 1024}
QUICK_SIZES = {"cuda": 2048, "cpu": 256}
DENSITY = 0.2
"""Share of elements that are not 0: a sum of N = 8192 products has a standard deviation of 18."""
GFLOPS = 1e9


def measure(site: Site) -> dict[str, Any] | None:
    """FLOP/s of the median product, and rows that came out wrong. Alone there is nobody to compare with."""
    limits, device = site.limits, site.world.device
    if site.world.size == 1 and not limits.full:
        return None
    size = (SIZES if limits.full else QUICK_SIZES)[device.type]
    generator = torch.Generator().manual_seed(site.world.rank)
    a_NN, b_NN = (_signs(size, generator).to(device, site.dtype) for _ in range(2))
    torch.mm(a_NN, b_NN)
    dist.barrier()
    took: list[float] = []
    end = time.perf_counter() + limits.compute_s
    while not took or time.perf_counter() < end:
        _synchronise(device)
        start = time.perf_counter()
        c_NN = torch.mm(a_NN, b_NN)
        _synchronise(device)
        took.append(time.perf_counter() - start)
    return {"flops": 2 * size**3 / median(took), "wrong": wrong_rows(a_NN, b_NN, c_NN)}


def _signs(size: int, generator: torch.Generator) -> Tensor:
    uniform_NN = torch.rand(size, size, generator=generator)
    return (uniform_NN < DENSITY / 2).float() - (uniform_NN > 1 - DENSITY / 2).float()


def wrong_rows(a_NN: Tensor, b_NN: Tensor, c_NN: Tensor) -> int:
    """Rows of C = A B that do not add up."""
    expected_N = a_NN.double() @ b_NN.double().sum(1)
    return int((c_NN.double().sum(1) != expected_N).sum())


def judge(records: Sequence[Record], limits: "Preflight") -> list[Finding]:
    """Ranks that compute wrongly, or more slowly than the others."""
    having = [record for record in records if "compute" in record.found]
    found = []
    for there in by_host([record for record in having if record.found["compute"]["wrong"]]).values():
        rows = sum(record.found["compute"]["wrong"] for record in there)
        text = f"{who(there)}: computes wrongly: {rows} rows of a matrix product do not add up. Take it out of the run."
        found.append(Finding("compute", [record.rank for record in there], text))

    def say(worst: float, usual: float) -> str:
        return (
            f"multiplies matrices at {worst / GFLOPS:,.0f} GFLOP/s, {worst / usual:.0%} of the median "
            f"({usual / GFLOPS:,.0f}); at least {limits.share:.0%} are asked for. Is it hot, throttled, or shared?"
        )

    flops = {record.rank: record.found["compute"]["flops"] for record in having}
    return found + slow_ranks("compute", records, flops, limits.share, say)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
