"""What a run would be, from its configuration alone: for `dry_run=true`."""

from typing import TYPE_CHECKING

import torch

from parallel.layout import Layout

if TYPE_CHECKING:
    from train.config import RunConfig

VOCABULARY = 32768
"""Assumed where the tokenizer is not at hand: it decides the embedding's size only."""


def plan(config: "RunConfig") -> str:
    """A few lines: what is trained, on how many tokens, by how many processes."""
    layout, stage = config.parallel, config.stage
    lines = [f"{config.name} into {config.run_dir}"]
    if config.init_from:
        lines.append(f"model   weights of {config.init_from}")
    else:
        with torch.device("meta"):
            decoder = config.model.build(VOCABULARY)
        total = sum(p.numel() for p in decoder.parameters()) / 1e6
        blocks = sum(p.numel() for p in decoder.blocks.parameters()) / 1e6
        lines.append(f"model   {total:,.1f} M parameters, {blocks:,.1f} M in the blocks; vocabulary {VOCABULARY}")
    if hasattr(stage, "steps"):
        length = config.data.sequence_length
        tokens = stage.steps * stage.global_batch * length / 1e9
        per_rank = stage.global_batch // (layout.dp * layout.micro_batches)
        lines += [
            f"run     {stage.steps:,} steps of {stage.global_batch} x {length} tokens = {tokens:,.3f} B tokens",
            f"layout  {layout.world_size} processes: {_axes(layout)}, ZeRO-{layout.zero}, "
            f"{layout.micro_batches} micro-batches of {per_rank} sequences a data-parallel rank",
        ]
        if layout.pp > 1:
            stages = layout.pp * layout.virtual_stages
            lines.append(f"stages  {stages}, {layout.virtual_stages} a rank, by schedule {layout.schedule}")
    return "\n".join(lines)


def _axes(layout: Layout) -> str:
    """The axes of more than one rank, as in "pp 2 x tp 4"."""
    sizes = {name: getattr(layout, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "dp_shard 1"
    return shown + (f" (ep {layout.ep})" if layout.ep > 1 else "")
