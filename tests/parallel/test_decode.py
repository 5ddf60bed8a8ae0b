"""Text from a model that is spread over ranks is the text of the whole model."""

import pytest
import torch

from parallel import distributed
from parallel.engine import Settings
from parallel.engines.native import Native, NativeEngine
from parallel.layout import Layout
from tests.ranks import run_ranks
from tests.train.test_generate import PROMPTS, Bytes
from tools.parity import ADAMW, batch_of, shares
from train.generate import Generator, Sampling
from train.models.transformer import DecoderConfig, initialise
from train.objectives.clm import CausalLM

CONFIG = DecoderConfig(layers=4, hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8, max_positions=64)
SAMPLING = Sampling(max_tokens=8, temperature=1.0, seed=3)


def step(engine: NativeEngine, number: int) -> float:
    batch = shares(batch_of(number), engine.dp_rank, engine.dp_size, engine.layout.micro_batches)
    return engine.train_step(batch, CausalLM(), 1.0).loss.item()


def say(layout: Layout) -> tuple[list[list[int]], list[float]]:
    with torch.device("meta"):
        model = CONFIG.build(301)
    engine = Native().build(
        model,
        layout,
        ADAMW.build,
        world=distributed.start(),
        settings=Settings(precision="fp32"),
        initialise=lambda placed: initialise(placed, 0),
    )
    losses = [step(engine, 0)]
    with engine.decoding() as decoder:
        said = Generator(decoder, Bytes()).generate(PROMPTS, SAMPLING)
    return said, [*losses, step(engine, 1)]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, micro_batches=2),
        Layout(pp=2, schedule="zbv", virtual_stages=2, micro_batches=4),
        Layout(pp=2, dp_shard=2, zero=3, micro_batches=2),
        Layout(cp=2, micro_batches=2),
        Layout(cp=2, tp=2, ring=True, micro_batches=2),
    ],
    ids=["tp2", "zbv", "pp2-zero3", "cp2", "cp2-tp2-ring"],
)
def test_every_rank_says_what_one_process_says_and_trains_on(layout: Layout) -> None:
    [(expected, losses)] = run_ranks(1, say, Layout())
    for said, found in run_ranks(layout.world_size, say, layout):
        assert said == expected
        assert found == pytest.approx(losses, abs=5e-6)
