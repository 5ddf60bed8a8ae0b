"""What the loader costs a training step: the share of its time spent waiting for a batch, where steps are as short as
they get, and what is left of a step's time when batches cost nothing.

A loader's thread shares the interpreter with the loop, so waiting is not all that it may cost: steps on batches that
are at hand are timed in turn with the others.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from conf.registry import register
from data_pipeline.loader import AHEAD, Loader
from data_pipeline.mixture import MixtureData, MixtureSource
from parallel import distributed
from parallel.engine import Settings
from parallel.engines.native import Native
from parallel.layout import Layout
from tools.benches.order import Ids, write_corpus
from train.models.transformer import DecoderConfig, initialise
from train.objectives.clm import CausalLM
from train.optim.adamw import AdamW

TINY = DecoderConfig(layers=2, hidden=64, intermediate=192, heads=4, kv_heads=2, head_dim=16)


@register("bench", "loader")
@dataclass(frozen=True)
class LoaderBench:
    """Train on a mixture of sparse corpora, with a loader and on batches that are at hand, by turns.

    Args:
        model: what is trained; small, so that steps are short.
        vocabulary: rows of its embedding.
        corpora: of 10^9 tokens each.
        sequence_length: tokens per window.
        global_batch: windows per step.
        steps: timed steps of each side.
        turn: steps that a side takes at a time.
        packing: as in `data=text`.
        directory: where the corpora are written; empty for the system's temporary directory.
    """

    model: DecoderConfig = TINY
    vocabulary: int = 512
    corpora: int = 3
    sequence_length: int = 256
    global_batch: int = 16
    steps: int = 100
    turn: int = 20
    packing: str = "stream"
    directory: str = ""

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it."""
        world = distributed.start()
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.directory or None) as name:
            loader = self._loader(Path(name))
            with torch.device("meta"):
                model = self.model.build(self.vocabulary)
            engine = Native().build(
                model,
                Layout(),
                AdamW().build,
                world=world,
                settings=Settings(),
                initialise=lambda placed: initialise(placed, 0),  # type: ignore[arg-type]
            )
            at_hand = [loader.batch(step) for step in range(self.turn)]
            waits: list[float] = []
            with_loader: list[float] = []
            without: list[float] = []
            step = self.turn
            for turn in range(self.steps // self.turn + 1):
                for number in range(self.turn):
                    began = time.perf_counter()
                    following = loader.batch(step)
                    waited = time.perf_counter() - began
                    batch = following  # only now is the last one freed, which lets the thread run
                    engine.train_step(batch, CausalLM(), 1.0).loss.item()
                    if turn and number > AHEAD:  # what was prepared while the other side ran came for nothing
                        waits.append(waited)
                        with_loader.append(time.perf_counter() - began)
                    step += 1
                for batch in at_hand:
                    began = time.perf_counter()
                    engine.train_step(batch, CausalLM(), 1.0).loss.item()
                    if turn:
                        without.append(time.perf_counter() - began)
            began = time.perf_counter()
            for number in range(self.turn):
                loader.batch(step + number)
            alone = (time.perf_counter() - began) / self.turn
            loader.close()
        tokens = self.global_batch * self.sequence_length
        return {
            "step, batches at hand (ms)": 1000 * statistics.median(without),
            "step with the loader (ms)": 1000 * statistics.median(with_loader),
            "step with the loader / at hand": statistics.median(with_loader) / statistics.median(without),
            "wait for a batch, median (ms)": 1000 * statistics.median(waits),
            "share of the time spent waiting": sum(waits) / sum(with_loader),
            "training (tokens/s)": tokens / statistics.median(with_loader),
            "loader alone, one batch after the other (ms)": 1000 * alone,
            "loader alone (tokens/s)": tokens / alone,
        }

    def _loader(self, directory: Path) -> Loader:
        for number in range(self.corpora):
            write_corpus(directory / str(number), 10**9, 10**6)
        sources = {
            str(number): MixtureSource(str(directory / str(number)), weight=number + 1, packing=self.packing)
            for number in range(self.corpora)
        }
        data = MixtureData(sources, sequence_length=self.sequence_length)
        samples = data.open("train", Ids(self.vocabulary), seed=0)  # type: ignore[arg-type]
        return Loader(samples, global_batch=self.global_batch, micro_batches=1, dp_rank=0, dp_size=1, seed=0)
