"""What a run would be, from its configuration alone: for `dry_run=true`."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from train.config import RunConfig

VOCABULARY = 32768
"""Assumed where the tokenizer is not at hand: it decides the embedding's size only."""


def plan(config: "RunConfig") -> str:
    """A few lines: what is trained, on how many tokens, by how many processes."""
    layout, stage = config.parallel, config.stage
    if config.init_from:
        model = f"model        weights of {config.init_from}"
    else:
        with torch.device("meta"):
            decoder = config.model.build(VOCABULARY)
        total = sum(p.numel() for p in decoder.parameters())
        blocks = sum(p.numel() for p in decoder.blocks.parameters())
        model = f"model        {total / 1e6:,.1f} M parameters ({blocks / 1e6:,.1f} M in the blocks; vocabulary {VOCABULARY})"
    lines = [f"{stage.kind} into {config.run_dir}", model]
    if hasattr(stage, "steps"):
        tokens = stage.steps * stage.global_batch * config.data.sequence_length
        lines += [
            f"run          {stage.steps:,} steps of {stage.global_batch} x {config.data.sequence_length} = {tokens / 1e9:,.3f} B tokens",
            f"layout       {layout.world_size} processes: dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard}, "
            f"ZeRO-{layout.zero}, {stage.global_batch // (layout.dp * layout.micro_batches)} sequences a micro-batch",
        ]
    return "\n".join(lines)
