"""A function of whole matrices does not see that they are sharded."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from parallel import distributed
from parallel.matrices import MatrixError, chunk_sizes, map_whole
from tests.ranks import run_ranks

ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()

SHAPES = [(7, 3), (8, 5), (2, 9), (1, 4), (7, 3), (16, 16), (5, 1), (6, 4)]
"""More than a round, unlike, and some with fewer rows or columns than ranks."""

STACKS = [(4, 5, 3), (1, 2, 6), (3, 4, 4)]


def tensors(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]


def whole_product(matrix: Tensor) -> Tensor:
    """Needs every row and every column, in their order."""
    return matrix @ matrix.mT.cumsum(-1) @ matrix.cumsum(-1)


def mapped(sizes: tuple[int, ...], placed: list[tuple[tuple[int, ...], list[Placement]]]) -> tuple[list[Tensor], int]:
    """Full results for tensors of these shapes and placements on a mesh of these sizes, and how many matrices this rank
    worked on."""
    world = distributed.start()
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=("a", "b", "c")[: len(sizes)])
    shapes = [shape for shape, _ in placed]
    sharded = [
        distribute_tensor(full, mesh, placements) for full, (_, placements) in zip(tensors(shapes), placed, strict=True)
    ]
    calls: list[int] = []

    def counted(matrix: Tensor) -> Tensor:
        calls.append(math.prod(matrix.shape[:-2]))
        return whole_product(matrix)

    results = [
        DTensor.from_local(part, mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()
        for part, like in zip(map_whole(counted, sharded), sharded, strict=True)
    ]
    distributed.stop()
    return results, sum(calls)


def check(found: list[Tensor], shapes: list[tuple[int, ...]]) -> None:
    for result, full in zip(found, tensors(shapes), strict=True):
        torch.testing.assert_close(result, whole_product(full))


@pytest.mark.parametrize("placement", [ROWS, COLUMNS])
@pytest.mark.parametrize("ranks", [2, 3])
def test_matrices_split_by_rows_or_columns_are_shared_out_and_put_together(placement: Placement, ranks: int) -> None:
    answers = run_ranks(ranks, mapped, (ranks,), [(shape, [placement]) for shape in SHAPES])
    for found, _ in answers:
        check(found, SHAPES)
    assert [count for _, count in answers] == [len(range(rank, len(SHAPES), ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("placements", [[ROWS, COLUMNS], [COLUMNS, ROWS], [ROWS, ROWS]])
def test_matrices_split_over_two_axes_are_shared_out_among_the_ranks_of_both(placements: list[Placement]) -> None:
    answers = run_ranks(4, mapped, (2, 2), [(shape, placements) for shape in SHAPES])
    for found, _ in answers:
        check(found, SHAPES)
    assert [count for _, count in answers] == [2, 2, 2, 2]


def test_unlike_placements_go_together_and_replicas_repeat_the_work() -> None:
    placements = [[ROWS, COLUMNS], [COLUMNS, ROWS], [WHOLE, ROWS], [WHOLE, WHOLE], [COLUMNS, WHOLE], [ROWS, WHOLE]]
    placed = list(zip(SHAPES, placements, strict=False))
    answers = run_ranks(4, mapped, (2, 2), placed)
    for found, _ in answers:
        check(found, [shape for shape, _ in placed])
    assert sum(count for _, count in answers) == 2 * 1 + 1 * 2 + 1 * 4 + 2 * 2


def test_in_a_stack_whole_matrices_stay_where_they_are_and_split_ones_are_shared_out() -> None:
    stack, rows, columns = Shard(0), Shard(1), Shard(2)
    placements = [[stack, WHOLE], [stack, rows], [rows, columns], [stack, stack], [columns, stack]]
    placed: list[tuple[tuple[int, ...], list[Placement]]] = [(s, list(p)) for s in STACKS for p in placements]
    answers = run_ranks(4, mapped, (2, 2), [*placed, *((shape, [ROWS, COLUMNS]) for shape in SHAPES)])
    for found, _ in answers:
        check(found, [*(shape for shape, _ in placed), *SHAPES])
    matrices = sum(shape[0] for shape in STACKS)
    assert sum(count for _, count in answers) == matrices * (2 + 1 + 1 + 1 + 1) + len(SHAPES)


def fsdp_over_rows_of_rows() -> Tensor:
    """As fully_shard leaves a parameter whose rows tensor parallelism has split already."""
    world = distributed.start()
    mesh = init_device_mesh(world.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    linear = nn.Linear(5, 12, bias=False)
    linear.weight = nn.Parameter(distribute_tensor(tensors([(12, 5)])[0], mesh["tp"], [ROWS]))
    fully_shard(linear, mesh=mesh["dp"])
    weight = linear.weight
    [part] = map_whole(whole_product, [weight])
    full = DTensor.from_local(part, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())
    return full.full_tensor()


def test_rows_that_two_axes_split_the_inner_one_first_are_put_together() -> None:
    for found in run_ranks(4, fsdp_over_rows_of_rows):
        check([found], [(12, 5)])


def unreduced() -> None:
    mesh = init_device_mesh(distributed.start().device.type, (2,))
    map_whole(whole_product, [DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])])


def refused() -> str:
    with pytest.raises(MatrixError) as caught:
        unreduced()
    return str(caught.value)


def test_a_sum_that_was_not_reduced_is_refused() -> None:
    assert all("not reduced" in message for message in run_ranks(2, refused))


def test_unsharded_matrices_and_stacks_are_mapped_in_place() -> None:
    check(map_whole(whole_product, tensors([*SHAPES, *STACKS])), [*SHAPES, *STACKS])


def test_rows_are_dealt_as_torch_chunks_them() -> None:
    for rows in range(1, 20):
        for ranks in range(1, 6):
            sizes = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
            assert chunk_sizes(rows, ranks) == sizes + [0] * (ranks - len(sizes))
