"""Agreement of annotators: published examples, another implementation, and who stands apart."""

import math
import random

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.agreement import (
    LEVELS,
    SIGNIFICANCE,
    _at_most,
    cohen_kappa,
    decided,
    fleiss_kappa,
    krippendorff_alpha,
    majority,
    report,
    standing,
)

OBSERVERS = {
    "A": "1 2 3 3 2 1 4 1 2 . . .",
    "B": "1 2 3 3 2 2 4 1 2 5 . 3",
    "C": ". 3 3 3 2 3 4 2 2 5 1 .",
    "D": "1 2 3 3 2 4 4 1 2 5 1 .",
}
"""Krippendorff 2011, section C: four observers, twelve units, missing values."""

FLEISS = """
    0 0 0 0 14
    0 2 6 4 2
    0 0 3 5 6
    0 3 9 2 0
    2 2 8 1 1
    7 7 0 0 0
    3 2 6 3 0
    2 5 3 2 2
    6 5 2 1 0
    0 2 2 3 7
"""
"""The worked example of the article "Fleiss' kappa": ten subjects, fourteen raters, five categories."""


def table(rows: dict[str, list]) -> dict[str, dict]:
    """Annotator -> labels of all items, None where missing, as votes."""
    items = len(next(iter(rows.values())))
    return {
        str(item): {name: labels[item] for name, labels in rows.items() if labels[item] is not None}
        for item in range(items)
    }


def observers() -> dict[str, dict]:
    return table({name: [None if x == "." else int(x) for x in row.split()] for name, row in OBSERVERS.items()})


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level, alpha):
    assert krippendorff_alpha(observers(), level) == pytest.approx(alpha, abs=5e-4)


def test_fleiss_kappa_of_the_worked_example():
    votes = {}
    for item, row in enumerate(FLEISS.strip().splitlines()):
        labels = [label for label, count in enumerate(map(int, row.split())) for _ in range(count)]
        votes[str(item)] = {str(rater): label for rater, label in enumerate(labels)}
    assert fleiss_kappa(votes) == pytest.approx(0.210, abs=5e-4)


def test_cohen_kappa_of_the_textbook_example():
    """50 proposals: both yes 20, both no 15, only the first yes 5, only the second yes 10."""
    both = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    votes = {str(n): {"A": a, "B": b} for n, (a, b) in enumerate(both)} | {"alone": {"A": "yes"}}
    assert cohen_kappa(votes, "A", "B") == (pytest.approx(0.4), 50)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from([None, 1, 2, 3, 7]), min_size=4, max_size=4), min_size=2, max_size=12))
def test_alpha_equals_that_of_the_package(items):
    rows = {str(n): [item[n] for item in items] for n in range(4)}
    several = {x for item in items if sum(v is not None for v in item) > 1 for x in item if x is not None}
    for level in LEVELS:
        ours = krippendorff_alpha(table(rows), level)
        if len(several) < 2:
            assert ours is None
            continue
        data = np.array([[np.nan if x is None else x for x in row] for row in rows.values()], dtype=float)
        data[:, [sum(v is not None for v in item) < 2 for item in items]] = np.nan
        assert ours == pytest.approx(krippendorff.alpha(reliability_data=data, level_of_measurement=level))


def test_who_agrees_entirely_has_one_and_who_guesses_has_none():
    draw = random.Random(0)
    same = {str(n): dict.fromkeys("ABC", draw.choice("xy")) for n in range(500)}
    guess = {str(n): {name: draw.choice("xy") for name in "ABC"} for n in range(2000)}
    for measure in (fleiss_kappa, krippendorff_alpha, lambda votes: cohen_kappa(votes, "A", "B")[0]):
        assert measure(same) == 1
        assert abs(measure(guess)) < 0.07


def test_what_cannot_be_measured_is_none_and_not_a_number():
    alone, alike = {"1": {"A": "x"}}, {"1": {"A": "x", "B": "x"}}
    for votes in ({}, alone, alike):
        assert fleiss_kappa(votes) is krippendorff_alpha(votes) is cohen_kappa(votes, "A", "B")[0] is None


@pytest.mark.parametrize("level", ["ratio", "Nominal", ""])
def test_an_unknown_level_is_refused(level):
    with pytest.raises(ValueError, match="expected one of nominal, ordinal, interval"):
        krippendorff_alpha(observers(), level)


def test_numbers_are_ordered_as_numbers_whatever_their_type():
    rows = {"A": [1, 2.5, 3, 3], "B": [1.0, 3, 2.5, 3]}
    whole = {name: [10 * x for x in row] for name, row in rows.items()}
    assert krippendorff_alpha(table(rows), "ordinal") == pytest.approx(krippendorff_alpha(table(whole), "ordinal"))


def test_majority_is_more_than_half_and_unanimity_all():
    assert majority(["a", "a", "b"]) == "a" and majority(["a", "b"]) is None and majority([]) is None
    assert decided(["a", "a", "b"], "majority") == "a" and decided(["a", "a", "b"], "unanimity") is None
    assert decided(["a", "a"], "unanimity") == "a"


def crowd(draw: random.Random, skill: dict[str, float], items: int) -> dict[str, dict]:
    """Votes of annotators who are right with a given probability."""
    votes: dict[str, dict] = {}
    for n in range(items):
        right = draw.choice("ab")
        wrong = "b" if right == "a" else "a"
        votes[str(n)] = {name: right if draw.random() < p else wrong for name, p in skill.items()}
    return votes


def test_a_weak_annotator_is_flagged_and_no_other():
    votes = crowd(random.Random(1), {"A": 0.9, "B": 0.9, "C": 0.9, "D": 0.6}, 200)
    assert [one.annotator for one in standing(votes) if one.weak] == ["D"]


def test_among_equals_nobody_is_flagged_more_often_than_the_test_says():
    draw, runs = random.Random(2), 200
    equals = dict.fromkeys("ABCDEFGH", 0.8)
    certain = sum(any(one.p < SIGNIFICANCE for one in standing(crowd(draw, equals, 60))) for _ in range(runs))
    assert certain <= SIGNIFICANCE * runs + 3 * math.sqrt(SIGNIFICANCE * runs)


def test_a_difference_that_is_certain_but_small_is_no_weakness():
    votes = crowd(random.Random(3), {"A": 0.95, "B": 0.95, "C": 0.95, "D": 0.9}, 20_000)
    lowest = min(standing(votes), key=lambda one: one.agreement)
    assert lowest.annotator == "D" and lowest.p < 1e-6 and not lowest.weak


def test_the_probability_is_fishers():
    """The lady who tasted eight cups of tea (Fisher 1935): at most 3 of 4 right is 69 in 70, at most 0 is 1 in 70."""
    assert _at_most(3, 4, 1, 4) == pytest.approx(69 / 70) and _at_most(0, 4, 4, 4) == pytest.approx(1 / 70)
    assert _at_most(0, 0, 3, 5) == pytest.approx(1)


def test_the_report_is_json_with_every_measure():
    found = report(observers(), "ordinal")
    assert found["items"] == 12 and found["items_with_two_votes"] == 11 and found["votes"] == 41
    assert found["krippendorff_alpha"] == pytest.approx(0.815, abs=5e-4)
    assert set(found["cohen_kappa"]) == {"A and B", "A and C", "A and D", "B and C", "B and D", "C and D"}
    assert [one["annotator"] for one in found["annotators"]] == ["A", "B", "C", "D"]
