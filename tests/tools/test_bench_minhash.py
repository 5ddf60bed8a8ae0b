"""The bench of MinHash compares what it says it compares."""

import pytest

from tools.benches.minhash import MinHashBench


@pytest.mark.slow
def test_both_sides_find_the_same_clusters() -> None:
    figures = MinHashBench(sizes=(300, 600), rounds=1).run()
    assert figures["clusters that differ"] == 0
    assert figures["near-duplicates dropped by datatrove"] > 10
    assert "time grows as size to the power" in figures
