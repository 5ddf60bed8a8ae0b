import pytest

from tools.benches.curation import CurationBench


@pytest.mark.slow
def test_both_sides_judge_all_documents_alike_and_time_is_given_to_every_step():
    figures = CurationBench(megabytes=0.3, rounds=1, processes=2).run()
    assert figures["documents judged otherwise"] == 0
    assert 0 < figures["documents kept"] < figures["documents"]
    shares = [value for name, value in figures.items() if name.endswith("share of our time")]
    assert len(shares) == 7 and 0.9 < sum(shares) <= 1
