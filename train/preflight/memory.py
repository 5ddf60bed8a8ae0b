"""Memory: weights, gradients and moments of a rank against what is free there.

The least that a layout needs, from its arithmetic (Rajbhandari et al. 2019, arXiv:1910.02054, section 5, with what
FSDP2 gathers): activations, buffers and kernels' workspaces come on top, so what fits here may not fit yet, but what
does not fit here never will.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from parallel.layout import Layout
from parallel.plan import chosen
from train.models.transformer import Decoder
from train.plan import VOCABULARY
from train.preflight.base import Finding, Record, Site, by_host, who

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.preflight.limits import Preflight
    from train.start import Start

FP32 = 4
GB = 1e9
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Parts:
    """Parameters of a model, by how they are shared.

    Args:
        dense: of all blocks, without experts.
        experts: of all blocks' experts.
        block: of the largest block.
        embedding: of the input.
        head: of the output, with the last norm; without a matrix of its own where that is the embedding.
        tied: whether it is.
    """

    dense: int
    experts: int
    block: int
    embedding: int
    head: int
    tied: bool

    @classmethod
    def of(cls, model: Decoder) -> "Parts":
        experts = sum(p.numel() for _, module in chosen(model, model.plan.experts) for p in module.parameters())
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks if block is not None]
        embedding = sum(p.numel() for p in model.model.embed_tokens.parameters())
        everything = sum(p.numel() for p in model.parameters())
        head = everything - sum(blocks) - embedding
        return cls(sum(blocks) - experts, experts, max(blocks), embedding, head, model.config.tied)

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.embedding + self.head

    def of_rank(self, layout: Layout) -> tuple[float, float]:
        """Parameters of the fullest rank before data-parallel ranks share them: those of no expert, of experts."""
        if layout.pp == 1:
            ends: float = self.embedding + self.head
        else:
            ends = max(self.embedding, self.head + (self.embedding if self.tied else 0))
        return (self.dense / layout.pp + ends) / layout.tp, self.experts / layout.ep / layout.pp / layout.tp


@dataclass(frozen=True)
class Need:
    """Bytes of a run.

    Args:
        device: of a rank, where it computes.
        host: of a rank, in host memory, beside what it computes with.
        checkpoint: of one checkpoint, over all ranks.
        model: of the weights that are handed on.
    """

    device: float
    host: float
    checkpoint: int
    model: int


def need_of(config: "RunConfig", start: "Start | None", dtype: torch.dtype) -> Need:
    """Of the run that is configured; of a vocabulary of usual size, where no tokenizer is at hand."""
    if start is not None:
        model = start.build()
    else:
        with torch.device("meta"):
            model = config.model.build(VOCABULARY)
    moments = getattr(config.optim, "moment_bytes", 2 * FP32)
    averaged = getattr(config.stage, "ema", 0.0) > 0
    return estimate(Parts.of(model), config.parallel, moments=moments, width=dtype.itemsize, averaged=averaged)


def estimate(parts: Parts, layout: Layout, *, moments: float, width: int, averaged: bool = False) -> Need:
    """The least that a layout needs.

    Args:
        parts: of the model.
        layout: where it is put.
        moments: bytes of optimizer state a parameter.
        width: bytes of a number that is computed with.
        averaged: whether an average of the weights is kept.
    """
    dense, experts = parts.of_rank(layout)
    shards = layout.dp_shard * layout.cp if layout.zero else 1
    mine = dense + experts
    share = dense / shards + experts / max(1, shards / layout.ep)  # ep is cut out of the ranks that share
    masters, average = FP32 * share, FP32 * share * averaged
    gradients = FP32 * (share if layout.zero >= 2 else mine)
    gathered = 0.0
    if layout.dp * layout.cp > 1 or width != FP32:
        gathered = width * (parts.block / layout.tp if layout.zero == 3 else mine)
    state = moments * share
    device, host = masters + average + gradients + gathered + state, 0.0
    if layout.offload != "none":
        host = state + (masters + gradients if layout.offload == "parameters" else 0)
        device -= host
    checkpoint = (FP32 * (1 + averaged) + 2 * FP32 * (moments > 0)) * parts.total  # moments are widened to fp32
    return Need(device, host, int(checkpoint), FP32 * parts.total)


def measure(site: Site) -> dict[str, Any]:
    """Bytes that this rank needs and that are free, on its device and on its machine."""
    need = site.need
    if site.world.device.type != "cuda":
        return {"host_needed": need.device + need.host, "host_free": free_of_host()}
    return {
        "device_needed": need.device,
        "device_free": torch.cuda.mem_get_info(site.world.device)[0] + torch.cuda.memory_reserved(site.world.device),
        "host_needed": need.host,
        "host_free": free_of_host(),
    }


def judge(records: Sequence[Record], limits: "Preflight") -> list[Finding]:
    """Devices and machines that cannot hold what is put there."""
    found = []
    for there in by_host([record for record in records if "memory" in record.found]).values():
        full = [r for r in there if _exceeds(r, "device", limits.memory)]
        if full:
            memory = full[0].found["memory"]
            found.append(_too_small(full, memory["device_needed"], memory["device_free"], limits, "GPU memory a rank"))
        needed = sum(record.found["memory"]["host_needed"] for record in there)
        free = min(record.found["memory"]["host_free"] for record in there)
        if needed > limits.memory * free:
            found.append(_too_small(there, needed, free, limits, "memory"))
    return found


def _exceeds(record: Record, where: str, share: float) -> bool:
    memory = record.found["memory"]
    return f"{where}_needed" in memory and memory[f"{where}_needed"] > share * memory[f"{where}_free"]


def _too_small(there: Sequence[Record], needed: float, free: float, limits: "Preflight", of: str) -> Finding:
    text = (
        f"{who(there)}: weights, gradients and moments need {needed / GB:,.2f} GB of {of}, {limits.memory:g} x "
        f"{free / GB:,.2f} GB are free. Share them among more ranks (parallel.zero=3, a larger dp_shard, tp or pp), or "
        "use parallel.offload."
    )
    return Finding("memory", [record.rank for record in there], text)


def free_of_host() -> float:
    """Bytes that this machine, or the control group this process is in, has left. Pages of files, which the kernel
    gives up for what asks, count as used there, and are left here."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(pages["inactive_file"]) + int(pages["active_file"])
        return min(free, int(limit) - int(used) + cached) if limit != "max" else free
    except (OSError, ValueError, KeyError):
        return free
