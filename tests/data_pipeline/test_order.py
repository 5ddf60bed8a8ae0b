"""The order is a permutation per epoch, fair, and computed in no time."""

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Order, Orders


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


def chi_square_of(table, expected):
    return ((table - expected) ** 2 / expected).sum()


def test_every_sample_is_as_likely_at_every_position():
    length, epochs = 20, 20_000
    visited = Order(length, seed=2)[np.arange(epochs * length)].reshape(epochs, length)
    table = np.stack([np.bincount(visited[:, place], minlength=length) for place in range(length)])
    degrees = (length - 1) ** 2
    assert abs(chi_square_of(table, epochs / length) - degrees) < 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 11), (18, 19)])
def test_every_pair_of_samples_is_as_likely_at_two_positions(first, second):
    length, epochs = 20, 40_000
    visited = Order(length, seed=9)[np.arange(epochs * length)].reshape(epochs, length)
    table = np.bincount(visited[:, first] * length + visited[:, second], minlength=length**2).reshape(length, length)
    assert not table.diagonal().any()
    pairs = table[~np.eye(length, dtype=bool)]
    assert abs(chi_square_of(pairs, epochs / len(pairs)) - len(pairs) + 1) < 4 * math.sqrt(2 * len(pairs))


def test_neighbours_in_the_corpus_are_neighbours_in_the_order_as_seldom_as_chance_has_it():
    length, epochs = 1000, 300
    visited = Order(length, seed=4)[np.arange(epochs * length)].reshape(epochs, length)
    adjacent = int((np.abs(np.diff(visited, axis=1)) == 1).sum())
    expected = epochs * 2 * (length - 1) / length  # nearly Poisson
    assert abs(adjacent - expected) < 4 * math.sqrt(expected)


def test_where_a_sample_is_in_one_epoch_says_nothing_of_the_next_nor_of_another_seed():
    length, bins = 50_000, 10
    first, second = Order(length, seed=6)[np.arange(2 * length)].reshape(2, length)
    other = Order(length, seed=7)[np.arange(length)]
    for a, b in itertools.combinations((first, second, other), 2):
        where_a, where_b = np.argsort(a) * bins // length, np.argsort(b) * bins // length
        table, _, _ = np.histogram2d(where_a, where_b, bins=bins)
        # Rows and columns are given: (bins - 1)^2 degrees of freedom.
        assert abs(chi_square_of(table, length / bins**2) - 81) < 4 * math.sqrt(2 * 81)


def test_orders_of_several_sources_are_those_of_each():
    lengths, seeds = [1, 7, 1000, 10**12], [3, 5, 5, 2**70]
    sources, ks = np.repeat(np.arange(4), 50), np.tile(np.arange(50), 4)
    together = Orders(lengths, seeds)[sources, ks]
    alone = np.concatenate([Order(n, seed)[np.arange(50)] for n, seed in zip(lengths, seeds, strict=True)])
    assert np.array_equal(together, alone)
