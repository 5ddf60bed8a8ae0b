"""The context bench measures what the table in parallel/context.py says."""

import pytest

from tools.benches.context import ContextBench


def test_a_ring_sends_more_and_keeps_less() -> None:
    figures = ContextBench(ranks=2, length=64, heads=4, head_dim=8, passes=1).run()
    own = 2 * 32 * 2 * 8 * 4 / 1e6  # keys and values of a rank's tokens, in MB
    assert figures["gather: sent MB"] == pytest.approx(2 * own)
    assert figures["ring: sent MB"] == pytest.approx(4 * own)
    assert figures["ring: kept MB"] < figures["gather: kept MB"]
