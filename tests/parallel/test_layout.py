"""A layout that does not fit says everything that is wrong, and what would work."""

from typing import Any

import pytest

from conf.errors import Problem
from parallel.layout import Layout, Sizes

MODEL = Sizes(layers=6, hidden=64, heads=12, kv_heads=4, experts=8)


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


def problems_of(layout: Layout, model: Sizes | None = MODEL, compile: bool = False) -> list[Problem]:
    """With as many processes and sequences as it asks for."""
    return layout.problems(layout.world_size, layout.dp * layout.micro_batches, model, compile=compile)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=4, zero=3, micro_batches=2, ring=True),
        Layout(pp=3, schedule="gpipe"),
        Layout(pp=4, micro_batches=1),
        Layout(pp=3, virtual_stages=2, schedule="interleaved_1f1b", micro_batches=6),
        Layout(pp=2, virtual_stages=2, schedule="interleaved_1f1b", micro_batches=1),
        Layout(pp=2, virtual_stages=3, schedule="looped_bfs", micro_batches=5, dp_shard=2, zero=3),
        Layout(pp=2, virtual_stages=2, schedule="interleaved_zero_bubble", micro_batches=4, dp_shard=2, zero=1),
        Layout(pp=3, virtual_stages=2, schedule="zbv", micro_batches=1),
        Layout(pp=2, virtual_stages=2, schedule="dual_pipe_v", micro_batches=4),
        Layout(pp=2, virtual_stages=2, schedule="zbv", zero=3),  # nobody to share with
        Layout(tp=12),  # 4 key/value heads, each on three ranks
        Layout(dp_replicate=4, ep=4),
        Layout(dp_shard=3, tp=2),  # replicas, which share nothing
        Layout(dp_shard=3, zero=3),
        Layout(recompute="0.25", offload="parameters"),
    ],
)
def test_a_combination_that_works_has_no_problems(layout: Layout) -> None:
    assert problems_of(layout) == []


REFUSED = [
    (dict(tp=5), "parallel.tp", ["12 query heads; and its 4 key/value heads", "use 1 or 2 or 4 or 12"]),
    (dict(tp=6), "parallel.tp", ["4 key/value heads", "use 1 or 2 or 4 or 12"]),
    (dict(pp=7), "parallel.pp", ["7 stages", "6 layers", "at most 6 stages"]),
    (dict(pp=4, virtual_stages=2, schedule="looped_bfs"), "parallel.pp", ["8 stages", "at most 6 stages"]),
    (dict(dp_shard=3, tp=2, zero=2), "parallel.dp_shard", ["64 features", "use 1 or 2 or 4"]),
    (dict(dp_shard=3, cp=2, tp=2, zero=2), "parallel.dp_shard", ["64 features", "use 1 or 2 or 4 or zero=0"]),
    (dict(cp=3, tp=2, zero=2), "parallel.dp_shard", ["64 features", "use zero=0"]),
    (dict(dp_shard=6, ep=2, zero=2), "parallel.dp_shard", ["64 features", "use"]),
    (dict(dp_shard=3, ep=3, zero=1), "parallel.ep", ["8 experts", "use 1 or 2 or 4"]),
    (dict(dp_shard=6, ep=4, zero=1), "parallel.ep", ["dp_shard x cp = 6 with zero=1", "use 2 or 3 or 6"]),
    (dict(dp_replicate=2, dp_shard=2, ep=4, zero=1), "parallel.ep", ["dp_shard x cp = 2", "use 1 or 2"]),
    (dict(dp_replicate=3, ep=2), "parallel.ep", ["dp_replicate x dp_shard x cp = 3", "use 1 or 3"]),
    (dict(pp=2, virtual_stages=2), "parallel.virtual_stages", ["one stage a rank", "schedule=interleaved_1f1b"]),
    (dict(pp=2, virtual_stages=2, schedule="gpipe"), "parallel.virtual_stages", ["one stage a rank; use 1"]),
    (dict(pp=2, schedule="interleaved_1f1b"), "parallel.virtual_stages", ["use 2 or more"]),
    (dict(pp=2, schedule="looped_bfs"), "parallel.virtual_stages", ["use 2 or more"]),
    (dict(pp=2, schedule="interleaved_zero_bubble"), "parallel.virtual_stages", ["use 2 or more"]),
    (dict(pp=2, virtual_stages=3, schedule="zbv"), "parallel.virtual_stages", ["use 2"]),
    (dict(pp=2, schedule="dual_pipe_v", micro_batches=4), "parallel.virtual_stages", ["use 2"]),
    (dict(virtual_stages=2), "parallel.virtual_stages", ["needs pp > 1"]),
    (
        dict(pp=2, virtual_stages=2, schedule="dual_pipe_v", micro_batches=3),
        "parallel.micro_batches",
        ["at least 4 = 2 x pp"],
    ),
    (
        dict(pp=2, virtual_stages=2, schedule="interleaved_1f1b", micro_batches=5),
        "parallel.micro_batches",
        ["pp=2", "use 4 or 6"],
    ),
    (
        dict(pp=3, virtual_stages=2, schedule="interleaved_zero_bubble", micro_batches=7),
        "parallel.micro_batches",
        ["pp=3", "use 6 or 8"],
    ),
    (dict(recompute="some"), "parallel.recompute", ["none, full, selective", "0.5"]),
    (dict(recompute="1.5"), "parallel.recompute", ["between 0 and 1"]),
    (dict(recompute="selective", dp_shard=2, ep=2), "parallel.recompute", ["full, a share of the blocks such as 0.5"]),
    (dict(offload="everything"), "parallel.offload", ["none, optimizer, parameters"]),
    (dict(ring=True), "parallel.ring", ["needs cp > 1"]),
    (dict(tp=2, async_tp=True), "parallel.async_tp", ["stage.compile=true"]),
]


@pytest.mark.parametrize(("axes", "key", "said"), REFUSED)
def test_a_combination_that_does_not_work_is_refused_with_values_that_would(
    axes: dict[str, Any], key: str, said: list[str]
) -> None:
    [problem] = problems_of(Layout(**axes))
    suffix = key.removeprefix("parallel.")
    assert (problem.key, problem.found) == (key, axes[suffix] if suffix in axes else getattr(Layout(), suffix))
    assert all(text in problem.fix for text in said), problem


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv", "dual_pipe_v"])
def test_a_backward_pass_in_halves_is_refused_with_compiled_blocks(schedule: str) -> None:
    layout = Layout(pp=2, virtual_stages=2, schedule=schedule, micro_batches=4)
    [problem] = problems_of(layout, compile=True)
    assert (problem.key, problem.found) == ("stage.compile", True)
    assert "silently wrong" in problem.fix and "interleaved_1f1b" in problem.fix


def test_asynchronous_tensor_parallelism_needs_ranks_to_overlap_with() -> None:
    [problem] = problems_of(Layout(async_tp=True), compile=True)
    assert (problem.key, problem.fix) == ("parallel.async_tp", "overlaps tensor-parallel collectives; needs tp > 1")


def test_experts_are_not_shared_where_there_are_none() -> None:
    [problem] = problems_of(Layout(dp_shard=2, ep=2), Sizes(6, 64, 12, 4))
    assert problem.key == "parallel.ep" and "has no experts" in problem.fix


def test_what_the_model_says_of_itself_is_not_repeated() -> None:
    assert problems_of(Layout(tp=2), Sizes(0, 64, 0, 2)) == []


def test_problems_of_every_axis_are_told_at_once() -> None:
    layout = Layout(pp=7, dp_shard=3, tp=5, ep=2, zero=3, schedule="zbv", recompute="x", ring=True)
    keys = [problem.key for problem in layout.problems(64, 8, MODEL, compile=True)]
    assert keys == [
        "parallel.recompute",
        "parallel.virtual_stages",
        "stage.compile",
        "parallel.ring",
        "parallel.ep",
        "parallel.tp",
        "parallel.pp",
        "parallel.dp_shard",  # the model's features
        "parallel.dp_shard",  # the number of processes
        "stage.global_batch",
    ]
