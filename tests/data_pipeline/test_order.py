"""The order is a permutation per epoch, fair, and computed in no time."""

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Order


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_every_epoch_visits_every_sample_once(length, seed, epoch):
    visited = Order(length, seed)[epoch * length + np.arange(length)]
    assert np.array_equal(np.sort(visited), np.arange(length))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 2**62), seed=st.integers(0, 2**32), k=st.integers(0, 2**62))
def test_one_position_gives_what_it_gives_among_others(length, seed, k):
    order = Order(length, seed)
    index = order[k]
    assert 0 <= index < length
    assert order[np.array([0, k, k])].tolist() == [order[0], index, index]


def test_epochs_and_seeds_give_other_orders():
    first, second = Order(1000, seed=0)[np.arange(2000)].reshape(2, 1000)
    other = Order(1000, seed=1)[np.arange(1000)]
    for a, b in itertools.combinations((first, second, other, np.arange(1000)), 2):
        assert (a == b).sum() < 10  # two random permutations agree in one place on average


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_all_permutations_of_few_samples_come_equally_often(length):
    epochs = 20_000
    seen = Counter(map(tuple, Order(length, seed=7)[np.arange(epochs * length)].reshape(epochs, length)))
    count = math.factorial(length)
    expected = epochs / count
    chi_square = sum((seen[p] - expected) ** 2 / expected for p in itertools.permutations(range(length)))
    assert chi_square < count - 1 + 4 * math.sqrt(2 * (count - 1))  # 4 standard deviations above the mean


def test_where_a_sample_lands_is_uniform_and_says_nothing_of_its_neighbour():
    length, bins = 100_000, 10
    visited = Order(length, seed=3)[np.arange(length)] * bins // length
    pairs, _, _ = np.histogram2d(visited[:-1], visited[1:], bins=bins)
    expected = (length - 1) / bins**2
    chi_square = ((pairs - expected) ** 2 / expected).sum()
    assert abs(chi_square - 99) < 4 * math.sqrt(2 * 99)


def test_a_million_million_samples_open_at_once():
    start = time.perf_counter()
    assert len(set(Order(10**12, seed=1)[np.arange(1000)].tolist())) == 1000
    assert time.perf_counter() - start < 1


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="between 1 and"):
        Order(0, seed=0)
    with pytest.raises(IndexError, match="-1"):
        Order(5, seed=0)[-1]
