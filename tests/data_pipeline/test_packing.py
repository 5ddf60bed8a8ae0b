import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import best_fit_decreasing

lengths_and_capacity = st.integers(1, 64).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=80), st.just(capacity))
)


@settings(deadline=None, max_examples=60)
@given(lengths_and_capacity, st.integers(0, 3))
def test_every_sequence_is_packed_once_and_no_window_overflows(case, seed):
    lengths, capacity = case
    windows = best_fit_decreasing(lengths, capacity, seed)
    assert sorted(i for window in windows for i in window) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in window) <= capacity for window in windows)


@settings(deadline=None, max_examples=60)
@given(lengths_and_capacity)
def test_windows_are_within_the_known_bound_of_the_optimum(case):
    lengths, capacity = case
    assert len(best_fit_decreasing(lengths, capacity, 0)) <= 11 / 9 * np.ceil(sum(lengths) / capacity) * 1.5 + 1


def test_the_fullest_window_with_room_is_taken():
    # 7 leaves 3, 6 leaves 4: the 3 goes to the window that it fills.
    assert best_fit_decreasing([7, 6, 3], 10, seed=0) == [[0, 2], [1]]


def test_packing_is_a_function_of_lengths_and_seed():
    lengths = np.random.default_rng(0).integers(1, 5, 200).tolist()
    assert best_fit_decreasing(lengths, 8, 1) == best_fit_decreasing(lengths, 8, 1)
    assert best_fit_decreasing(lengths, 8, 1) != best_fit_decreasing(lengths, 8, 2)


def test_short_sequences_fill_windows_almost_entirely():
    lengths = np.random.default_rng(0).integers(20, 90, 5000).tolist()
    windows = best_fit_decreasing(lengths, 512, 0)
    assert sum(lengths) / (512 * len(windows)) > 0.98
