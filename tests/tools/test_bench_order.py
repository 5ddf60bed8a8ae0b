"""The benches of order and loader run to their end, small, and tell what they promise."""

from tools.benches.loader import LoaderBench
from tools.benches.order import OrderBench


def test_a_stream_of_a_million_million_tokens_opens_in_less_than_a_second(tmp_path):
    figures = OrderBench(documents=1e5, samples=4096, made=32, directory=str(tmp_path)).run()
    assert figures["tokens"] == 1e12
    assert figures["open and have the first batch of a step in the middle (s)"] < 1
    assert figures["memory that all this took (MB)"] < 100
    assert not list(tmp_path.iterdir())


def test_the_wait_for_a_batch_is_a_share_of_the_step(tmp_path):
    figures = LoaderBench(steps=8, turn=4, global_batch=2, sequence_length=16, directory=str(tmp_path)).run()
    assert 0 <= figures["share of the time spent waiting"] < 1
    assert figures["loader alone (tokens/s)"] > 0
