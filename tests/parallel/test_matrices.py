"""A function of whole matrices does not see that they are sharded."""

import torch
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from parallel import distributed
from parallel.layout import Layout
from parallel.matrices import map_whole, rows_of
from parallel.mesh import data_mesh
from tests.ranks import run_ranks

SHAPES = [(7, 3), (8, 5), (2, 9), (1, 4), (7, 3), (16, 16), (5, 1)]
"""More than a round, unlike, and some with fewer rows than ranks."""


def matrices() -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]


def whole_product(matrix: Tensor) -> Tensor:
    """Needs every row."""
    return matrix @ matrix.T @ matrix


def mapped() -> list[Tensor]:
    world = distributed.start()
    mesh = data_mesh(Layout(dp_shard=world.size, zero=1), world.device)["dp_shard"]
    sharded = [distribute_tensor(matrix, mesh, [Shard(0)]) for matrix in matrices()]
    calls: list[torch.Size] = []

    def counted(matrix: Tensor) -> Tensor:
        calls.append(matrix.shape)
        return whole_product(matrix)

    parts = map_whole(counted, sharded)
    assert len(calls) == len(range(world.rank, len(SHAPES), world.size))  # shared out, not repeated
    return parts


def test_each_rank_gets_its_rows_of_the_whole_result() -> None:
    parts = run_ranks(3, mapped)
    for number, matrix in enumerate(matrices()):
        torch.testing.assert_close(torch.cat([part[number] for part in parts]), whole_product(matrix))


def test_unsharded_matrices_are_mapped_in_place() -> None:
    for found, matrix in zip(map_whole(whole_product, matrices()), matrices(), strict=True):
        assert torch.equal(found, whole_product(matrix))


def test_rows_are_dealt_as_torch_chunks_them() -> None:
    for rows in range(1, 20):
        for ranks in range(1, 6):
            sizes = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
            assert rows_of(rows, ranks) == sizes + [0] * (ranks - len(sizes))
