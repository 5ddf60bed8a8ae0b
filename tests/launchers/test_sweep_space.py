"""From text to values: what is tried, and which corners are checked first."""

import optuna
import pytest

from launchers.sweep import space


def sampled(text, seeds: int = 40) -> list:
    values = space.read({"key": text})["key"]
    drawn = []
    for seed in range(seeds):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        drawn.append(values.suggest(study.ask(), "key"))
    return drawn


def test_a_logarithmic_interval_gives_as_many_small_values_as_large_ones():
    drawn = sampled("log(1e-4, 1e-2)")
    assert all(1e-4 <= value <= 1e-2 for value in drawn) and 12 <= sum(value < 1e-3 for value in drawn) <= 28


def test_whole_numbers_are_whole_and_both_ends_are_among_them():
    for text in ("int(interval(2, 4))", "int(log(2, 4))"):
        drawn = sampled(text)
        assert set(drawn) == {2, 3, 4} and all(isinstance(value, int) for value in drawn), text


def test_a_range_leaves_its_end_out_as_hydras_does():
    assert set(sampled("range(16, 65, 16)")) == {16, 32, 48, 64}
    assert space.read({"key": "range(0, 1, 0.25)"})["key"].grid(9) == [0, 0.25, 0.5, 0.75]
    assert set(sampled("range(0, 1, 0.25)")) == {0, 0.25, 0.5, 0.75}


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        ("adamw,muon", ["adamw", "muon"]),
        ("choice(1, true, 'a b')", ["1", "true", "'a b'"]),
        ([None, 0.1, [0.9, 0.95], "1"], ["null", "0.1", "[0.9,0.95]", "'1'"]),
    ],
)
def test_listed_values_keep_their_type_as_overrides(written, texts):
    assert space.read({"key": written})["key"].grid(9) == texts


def test_a_grid_of_an_interval_has_its_ends_and_goes_evenly():
    grid = {text: space.read({"key": text})["key"].grid(3) for text in ("interval(0, 1)", "log(1e-4, 1e-2)")}
    assert grid["interval(0, 1)"] == [0, 0.5, 1] and grid["log(1e-4, 1e-2)"] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert space.read({"key": "int(interval(1, 2))"})["key"].grid(5) == [1, 2]


def test_nested_and_dotted_keys_are_the_same():
    assert space.read({"optim": {"lr": "log(1e-4,1e-2)"}}) == space.read({"optim.lr": "log(1e-4,1e-2)"})


def test_few_corners_are_all_checked_and_of_many_each_end_once():
    few = list(space.corners(space.read({"a": "log(1,2)", "b": "x,y,z"})))
    assert len(few) == 6 and {"a": 2.0, "b": "z"} in few
    many = list(space.corners(space.read({f"k{i}": "interval(0,1)" for i in range(6)})))
    assert len(many) == 7 and all({corner[f"k{i}"] for corner in many} == {0, 1} for i in range(6))
