"""A layout that does not fit says everything that is wrong, and what would work."""

import pytest

from conf.errors import Problem
from parallel.layout import Layout


def texts(problems: list[Problem]) -> str:
    return "\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("layout", "world_size", "global_batch"),
    [
        (Layout(), 1, 1),
        (Layout(dp_shard=2, zero=3, micro_batches=4), 2, 8),
        (Layout(dp_replicate=2, dp_shard=2, zero=2), 4, 4),
        (Layout(zero=3), 1, 3),  # a configuration tried on one process
    ],
)
def test_a_layout_that_fits_has_no_problems(layout: Layout, world_size: int, global_batch: int) -> None:
    assert layout.problems(world_size, global_batch) == []


def test_all_problems_are_found_at_once() -> None:
    layout = Layout(pp=2, tp=2, zero=4, schedule="1b1f", micro_batches=3)
    keys = [problem.key for problem in layout.problems(world_size=8, global_batch=16)]
    expected = ["parallel.zero", "parallel.schedule", "parallel.dp_shard"]
    assert keys == [*expected, "stage.global_batch"]


def test_a_wrong_number_of_processes_names_the_axis_and_the_number_that_would_fit() -> None:
    [problem] = Layout(dp_replicate=2, dp_shard=3, zero=1).problems(world_size=8, global_batch=12)
    assert (problem.key, problem.found) == ("parallel.dp_shard", 3)
    assert "needs 6 processes, 8 run" in problem.fix
    assert "parallel.dp_shard=4" in problem.fix
    assert "start 6 processes" in problem.fix


def test_a_batch_that_does_not_divide_names_the_nearest_that_do() -> None:
    [problem] = Layout(dp_shard=2, micro_batches=3, zero=1).problems(world_size=2, global_batch=16)
    assert (problem.key, problem.found) == ("stage.global_batch", 16)
    assert "12 or 18" in problem.fix
    assert "parallel.micro_batches=1 or 2 or 4" in problem.fix


@pytest.mark.parametrize("key", ["dp_shard", "micro_batches", "dp_replicate", "pp"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_problems_not_crashes(key: str, value: int) -> None:
    assert f"parallel.{key}" in [p.key for p in Layout(**{key: value}).problems(1, 8)]


def test_a_batch_of_nothing_is_a_problem() -> None:
    assert "stage.global_batch=0" in texts(Layout().problems(1, 0))


def test_sharing_state_among_replicas_only_is_refused() -> None:
    [problem] = Layout(dp_replicate=4, zero=2).problems(4, 4)
    assert problem.key == "parallel.zero"
    assert "dp_shard=4" in problem.fix
