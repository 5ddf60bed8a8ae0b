"""A model that is larger than a rank's share starts on ranks enough."""

import pytest

from tools.benches.memory import MemoryBench
from train.models.transformer import DecoderConfig


@pytest.mark.slow
def test_the_peak_of_a_rank_falls_with_the_number_of_ranks() -> None:
    model = DecoderConfig(layers=8, hidden=768, intermediate=2048, heads=12, kv_heads=12, head_dim=64)
    figures = MemoryBench(model=model).run()
    size = figures["model, fp32 (MB)"]
    peaks = [figures[f"dp_shard={ranks}: peak above imports, largest rank (MB)"] for ranks in (1, 2, 4)]
    state = [figures[f"dp_shard={ranks}: of it weights and moments (MB)"] for ranks in (1, 2, 4)]
    assert peaks[0] > peaks[1] > peaks[2]
    assert peaks[2] < 2 * size, "weights, moments and gradients of one rank would be four times the model"
    assert state[2] == pytest.approx(3 * size / 4, rel=0.01)
