"""What a model's start costs each rank: peak memory while its blocks are read from safetensors and sharded by ZeRO-3.

The model is built without storage, and each rank reads its own part of the file: a model larger than one rank's memory
starts, where there are ranks enough.
"""

import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from conf.registry import register
from parallel import distributed
from parallel.engine import Settings
from parallel.engines.native import Native
from parallel.layout import Layout
from tools.ranks import run_ranks
from train.models import hf_weights
from train.models.transformer import DecoderConfig, initialise
from train.optim.adamw import AdamW

VOCABULARY = 1024
MODEL = DecoderConfig(layers=12, hidden=1024, intermediate=2752, heads=16, kv_heads=16, head_dim=64)


class NoTokens:
    """A tokenizer as far as writing a model needs one."""

    vocabulary, eos, pad = VOCABULARY, 0, 1

    def save(self, directory: Path) -> None:
        """Nothing is kept of it."""


@register("bench", "memory")
@dataclass(frozen=True)
class MemoryBench:
    """Start a model from a Hugging Face directory on 1, 2 and 4 ranks of this machine.

    Args:
        model: what is started; 600 MB of fp32 weights.
        ranks: values of dp_shard.
        directory: where the model is written; empty for the system's temporary directory.
    """

    model: DecoderConfig = MODEL
    ranks: tuple[int, ...] = (1, 2, 4)
    directory: str = ""

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.directory or None) as name:
            megabytes = run_ranks(1, _write, self.model, name)[0]
            figures = {"model, fp32 (MB)": megabytes}
            for ranks in self.ranks:
                peaks, state, seconds = zip(*run_ranks(ranks, _start, self.model, name, ranks), strict=True)
                figures |= {
                    f"dp_shard={ranks}: peak above imports, largest rank (MB)": max(peaks),
                    f"dp_shard={ranks}: of it weights and moments (MB)": max(state),
                    f"dp_shard={ranks}: start (s)": max(seconds),
                }
        return figures


def _write(config: DecoderConfig, directory: str) -> float:
    model = config.build(VOCABULARY)
    initialise(model, 0)
    weights = dict(model.named_parameters())
    hf_weights.write(directory, config, weights, NoTokens())  # type: ignore[arg-type]
    return sum(weight.nbytes for weight in weights.values()) / 1e6


def _start(config: DecoderConfig, directory: str, ranks: int) -> tuple[float, float, float]:
    """Peak resident memory that the start adds, what of it stays as weights and moments, in MB; and its seconds."""
    world = distributed.start()
    before, start = _peak(), time.perf_counter()
    with torch.device("meta"):
        model = config.build(VOCABULARY)
    engine = Native().build(
        model,
        replace(Layout(), dp_shard=ranks, zero=3),
        AdamW().build,
        world=world,
        settings=Settings(precision="fp32"),
        initialise=lambda placed: hf_weights.load(placed, directory, config),
    )
    seconds = time.perf_counter() - start
    locals_ = [getattr(tensor, "_local_tensor", tensor) for tensor in engine.state().values()]
    return _peak() - before, sum(tensor.nbytes for tensor in locals_) / 1e6, seconds


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
