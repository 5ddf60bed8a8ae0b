"""Which source comes when: exact shares, caps kept, no sample again before all came once, and no pattern."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.blend import LEAST_SHARE, Blend, ExhaustedError, Stage

WEIGHTS = st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0, 3.0]), min_size=3, max_size=3).filter(any)
RUNS = st.tuples(
    st.lists(st.integers(1, 3000), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(1, 4000), WEIGHTS), max_size=2, unique_by=lambda stage: stage[0]),
    WEIGHTS,
    st.integers(0, 2**32),
)


def run(case):
    caps, changes, first, seed = case
    stages = [Stage(0, tuple(first))] + [Stage(begin, tuple(weights)) for begin, weights in sorted(changes)]
    return caps, stages, Blend(caps, stages, seed)


@settings(max_examples=60, deadline=None)
@given(RUNS)
def test_each_source_gives_its_samples_in_order_and_no_more_than_it_may(case):
    caps, stages, blend = run(case)
    sources, numbers = blend[np.arange(blend.length)]
    for source, cap in enumerate(caps):
        mine = numbers[sources == source]
        assert np.array_equal(mine, np.arange(len(mine)))
        assert len(mine) <= cap
    last = max(i for i, stage in enumerate(stages) if i == 0 or stage.begin <= blend.length)
    given_S = np.bincount(sources, minlength=3)
    assert all(given_S[s] == caps[s] for s in range(3) if stages[last].weights[s]), "it ended before it was dry"


@settings(max_examples=40, deadline=None)
@given(RUNS, st.data())
def test_a_position_gives_what_it_gives_among_others_and_counts_what_came_before(case, data):
    _, _, blend = run(case)
    sources, numbers = blend[np.arange(blend.length)]
    ks = np.array(data.draw(st.lists(st.integers(0, blend.length - 1), min_size=1, max_size=9)))
    assert np.array_equal(blend[ks], (sources[ks], numbers[ks]))
    k = data.draw(st.integers(0, blend.length))
    assert blend.taken(k).tolist() == np.bincount(sources[:k], minlength=3).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=12), st.integers(0, 10**15))
def test_no_prefix_of_blocks_is_a_sample_away_from_the_shares(weights, begin):
    blend = Blend([2**62] * len(weights), [Stage(0, tuple(weights))], 0)
    (segment,) = blend.segments
    for block in (0, 1, begin // segment.block, begin // segment.block + 1):
        taken_S, count = segment.before(block), block * segment.block
        assert taken_S.sum() == count
        exact_S = np.diff(segment.bounds_S, prepend=0).astype(object) * count / 2**31
        assert all(abs(taken - exact) < 1.001 for taken, exact in zip(taken_S.tolist(), exact_S, strict=True))
        assert (segment.counts(block) >= 0).all()


def test_where_a_share_is_spent_the_others_go_on_in_their_proportion():
    blend = Blend([2**62, 300, 2**62], [Stage(0, (0.6, 0.3, 0.1))], 0)
    sources, _ = blend[np.arange(50_000)]
    assert 900 < np.flatnonzero(sources == 1)[-1] < 1100
    late = np.bincount(sources[2000:], minlength=3) / 48_000
    assert late == pytest.approx([6 / 7, 0, 1 / 7], abs=1e-3)


def test_a_stage_changes_the_weights_at_its_position():
    blend = Blend([2**62] * 2, [Stage(0, (1, 0)), Stage(5000, (0, 1)), Stage(7000, (1, 1))], 0)
    sources, numbers = blend[np.arange(9000)]
    assert not sources[:5000].any() and sources[5000:7000].all()
    assert abs(sources[7000:].mean() - 0.5) < 0.05
    assert numbers[7000:][sources[7000:] == 0].min() == 5000, "a source goes on where it stopped"


def test_another_seed_is_another_order_of_the_same_counts():
    one, other = (Blend([2**62] * 2, [Stage(0, (1, 1))], seed)[np.arange(4096)][0] for seed in (0, 1))
    assert one.sum() == other.sum()
    assert 0.4 < (one == other).mean() < 0.6


def test_which_source_comes_says_nothing_of_the_next_nor_of_the_same_place_in_another_block():
    weights = np.array([0.5, 0.3, 0.2])
    blend = Blend([2**62] * 3, [Stage(0, tuple(weights))], 11)
    sources, _ = blend[np.arange(200 * 1024)]
    by_block = sources.reshape(200, 1024)
    for one, other in (
        (sources[:-1], sources[1:]),
        (sources[:-7], sources[7:]),
        (by_block[:-1].ravel(), by_block[1:].ravel()),
    ):
        pairs, _, _ = np.histogram2d(one, other, bins=3)
        expected = np.outer(weights, weights) * len(one)
        chi_square = ((pairs - expected) ** 2 / expected).sum()
        assert chi_square < 8 + 4 * math.sqrt(16)


def test_a_source_is_as_likely_at_every_place_of_a_block():
    blend = Blend([2**62] * 2, [Stage(0, (0.25, 0.75))], 5)
    by_block = blend[np.arange(400 * 1024)][0].reshape(400, 1024)
    counts = (by_block == 0).sum(0)
    chi_square = ((counts - 100) ** 2 / (100 * 0.75)).sum()
    assert abs(chi_square - 1023) < 4 * math.sqrt(2 * 1023)


def test_a_million_million_samples_open_anywhere_at_once():
    start = time.perf_counter()
    blend = Blend([10**12, 10**9, 10**11], [Stage(0, (1, 2 * LEAST_SHARE, 0.1)), Stage(10**11, (1, 1, 1))], 0)
    blend[9 * 10**11 + np.arange(1000)]
    assert time.perf_counter() - start < 1


def test_what_lies_behind_the_end_is_refused():
    blend = Blend([5, 7], [Stage(0, (1, 1))], 0)
    assert blend.length == 12
    with pytest.raises(ExhaustedError, match=r"sample 12 of the mixture does not exist.* 12 together"):
        blend[np.array([3, 12])]
