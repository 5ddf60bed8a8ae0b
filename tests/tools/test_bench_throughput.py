"""The throughput bench compares like with like."""

import pytest

from parallel import distributed
from tools.benches.throughput import BenchError, Throughput
from train.models.transformer import DecoderConfig

TINY = DecoderConfig(layers=2, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_contenders_see_the_same_losses(precision):
    bench = Throughput(
        TINY, vocabulary=64, batch=2, sequence_length=32, precision=precision, steps=4, warm_up=1, compiled=False
    )
    try:
        figures = bench.run()
    finally:
        distributed.stop()
    assert figures["ours: largest difference of the loss"] < (1e-3 if precision == "fp32" else 0.02)
    assert figures["Trainer: last loss (nats)"] < 4.17  # ln 64 = 4.16 before the first step
    assert figures["ours: speed / Trainer's, median of steps"] > 0


def test_a_model_that_the_yardstick_lacks_is_refused():
    with pytest.raises(BenchError, match="transformers' Llama, without qk_norm"):
        Throughput(DecoderConfig(qk_norm=True)).run()
