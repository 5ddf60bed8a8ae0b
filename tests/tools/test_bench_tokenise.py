"""The bench of tokenising compares like with like: both sides write the same bytes."""

import pytest

from tools.benches.tokenise import TokeniseBench


@pytest.mark.parametrize("algorithm", ["bpe", pytest.param("unigram", marks=pytest.mark.slow)])
def test_both_sides_write_the_same_bytes(algorithm, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the bench sets it, and it would stay
    figures = TokeniseBench(megabytes=1, vocabulary=1000, algorithm=algorithm, rounds=1).run()
    assert figures["same bytes in .bin and .idx (1 = yes)"] == 1
    assert figures["tokens (millions)"] > 0.2
