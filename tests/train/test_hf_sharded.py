"""Weights between files and ranks: each rank reads its block and nothing else, and none holds the model to write it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from parallel import distributed
from parallel.gather import Gathered
from tests.ranks import RanksError, run_ranks
from tests.train.test_hf import CONFIG, VOCABULARY, Words, weights_of
from train.models import hf_weights
from train.models.transformer import Decoder

PLACEMENTS = [
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Shard(0), Shard(0)),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
    (Replicate(), Replicate()),
]
"""Over 2 x 2 ranks; 61 rows and 3 heads split unevenly."""


def scattered(vocabulary: int = VOCABULARY) -> Decoder:
    """A decoder without values, whose matrices are shared among 4 ranks in six ways and whose vectors are cut twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = CONFIG.build(vocabulary)
    for number, module in enumerate(model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            placements: Any = PLACEMENTS[number % len(PLACEMENTS)] if parameter.ndim == 2 else (Shard(0), Shard(0))
            nothing = torch.full_like(parameter, torch.nan).detach()
            setattr(module, name, nn.Parameter(distribute_tensor(nothing, mesh, placements, src_data_rank=None)))
    return model


def values_after_loading(directory: str, vocabulary: int) -> tuple[dict[str, Tensor], int]:
    """Whole tensors, and how many elements this rank read."""
    distributed.start()
    model = scattered(vocabulary)
    read, counts = hf_weights.Stored._read, []

    def counted(self: hf_weights.Stored, name: str, *where: slice) -> Tensor:
        found = read(self, name, *where)
        counts.append(found.numel())
        return found

    hf_weights.Stored._read = counted  # type: ignore[method-assign]
    hf_weights.load(model, directory, CONFIG)
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}, sum(counts)  # type: ignore[union-attr]


def test_each_rank_reads_its_block_and_no_more(tmp_path: Path) -> None:
    weights = weights_of(CONFIG)
    hf_weights.write(tmp_path, CONFIG, weights, Words(), max_shard_bytes=8000)
    for values, elements in run_ranks(4, values_after_loading, str(tmp_path), VOCABULARY):
        assert all(torch.equal(values[name], weights[name]) for name in weights)
        assert elements < 0.6 * sum(weight.numel() for weight in weights.values())  # some of the six ways replicate


def test_new_rows_are_the_mean_on_the_ranks_that_have_them(tmp_path: Path) -> None:
    weights = weights_of(CONFIG)
    hf_weights.write(tmp_path, CONFIG, weights, Words())
    for values, _ in run_ranks(4, values_after_loading, str(tmp_path), VOCABULARY + 20):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(values[name][:VOCABULARY], weights[name])
            torch.testing.assert_close(values[name][VOCABULARY:], weights[name].mean(0).expand(20, -1))


def write_scattered(directory: str, source: str, max_shard_bytes: int) -> None:
    distributed.start()
    model = scattered()
    hf_weights.load(model, source, CONFIG)
    hf_weights.write(directory, CONFIG, dict(model.named_parameters()), Words(), max_shard_bytes)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 8000])
def test_ranks_write_the_files_that_one_process_writes(tmp_path: Path, max_shard_bytes: int) -> None:
    hf_weights.write(tmp_path / "alone", CONFIG, weights_of(CONFIG), Words(), max_shard_bytes)
    run_ranks(4, write_scattered, str(tmp_path / "ranks"), str(tmp_path / "alone"), max_shard_bytes)
    expected = {file.name: file.read_bytes() for file in (tmp_path / "alone").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "ranks").iterdir()} == expected


def write_by_stages(directory: str) -> None:
    """Each rank has some of the names, as pipeline stages have, and both have one of them; sharded by FSDP or plain."""
    world = distributed.start()
    model = CONFIG.build(VOCABULARY)
    model.load_state_dict(weights_of(CONFIG))
    names = sorted(weights_of(CONFIG))
    mine = [*names[world.rank * len(names) // 2 : (world.rank + 1) * len(names) // 2], "model.norm.weight"]
    hf_weights.write(directory, CONFIG, {name: p for name, p in model.named_parameters() if name in mine}, Words())


def test_ranks_may_have_different_tensors(tmp_path: Path) -> None:
    run_ranks(2, write_by_stages, str(tmp_path))
    found, weights = hf_weights.read(tmp_path, CONFIG), weights_of(CONFIG)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def gather_after_fsdp() -> dict[str, Tensor]:
    distributed.start()
    model = CONFIG.build(VOCABULARY)
    model.load_state_dict(weights_of(CONFIG))
    fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    gathered = Gathered(dict(model.named_parameters()))
    found = {name: gathered.whole(name, to=2) for name in gathered.meta}
    assert (dist.get_rank() == 2) == all(tensor is not None for tensor in found.values())
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def test_the_rank_that_asks_gets_the_whole_and_the_others_nothing() -> None:
    nothing, also_nothing, found = run_ranks(3, gather_after_fsdp)
    assert nothing == also_nothing == {}
    assert all(torch.equal(found[name], weight) for name, weight in weights_of(CONFIG).items())


def gather_a_part() -> None:
    world = distributed.start()
    mesh = init_device_mesh("cpu", (2,))
    whole = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    Gathered({"w": whole} if world.rank else {})


def test_a_tensor_that_is_nowhere_whole_is_refused() -> None:
    with pytest.raises(RanksError, match="w: the ranks hold 8 of 16 elements"):
        run_ranks(2, gather_a_part)


def fill_the_disk_of_rank_1(directory: str) -> str:
    world = distributed.start()
    append = hf_weights._append

    def full(file: Path, data: Any, sync: bool = False) -> OSError | None:
        return OSError(28, "No space left on device") if world.rank == 1 and not sync else append(file, data, sync)

    hf_weights._append = full  # type: ignore[assignment]
    with pytest.raises(hf_weights.UnwrittenError) as caught:
        hf_weights.write(directory, CONFIG, weights_of(CONFIG), Words(), max_shard_bytes=8000)
    return str(caught.value)


def test_a_full_disk_of_one_rank_is_told_to_all_and_nothing_is_left(tmp_path: Path) -> None:
    one, other = run_ranks(2, fill_the_disk_of_rank_1, str(tmp_path))
    assert one == other
    assert "No space left on device" in one
    assert "MB are needed" in one
    assert os.listdir(tmp_path) == []


def test_a_parameter_may_be_stored_as_several_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_apart(config: Any, name: str) -> str | list[str]:
        return [f"{name}.{row}" for row in range(VOCABULARY)] if name == "lm_head.weight" else name

    monkeypatch.setattr(hf_weights, "stored_names", rows_apart)
    weights = weights_of(CONFIG)
    hf_weights.write(tmp_path, CONFIG, weights, Words())
    stored = hf_weights.Stored(tmp_path, CONFIG)
    assert torch.equal(stored.rows("lm_head.weight", 0, VOCABULARY), weights["lm_head.weight"])
    block = torch.empty(5, 7)
    stored.fill(block, "lm_head.weight", (40, 3))
    assert torch.equal(block, weights["lm_head.weight"][40:45, 3:10])
