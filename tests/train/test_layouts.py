"""A checkpoint has no layout: every tensor of one comes back, bit for bit, at every other."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from parallel import distributed
from tests.ranks import run_ranks
from tools.parity.cells import EVERYTHING, EXPERTS
from tools.parity.layouts import parse
from tools.parity.training import Training, build, train
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.committed import INDEX, path_of


def _hops(directory: Path, training: Training, source: str, words: list[str]) -> None:
    """At each layout in turn: load what the one before left, save it again as it is, train on, and leave it."""
    for number, word in enumerate(words):
        world = distributed.start()
        engine = build(parse(word), training, world, seed=number)  # other values than those to be loaded
        if source:
            Checkpoints(directory / source, every=1, keep=1).restore(engine.state())
            engine.loaded()
            _save(directory / f"{word} as loaded", engine.state())
        train(engine, parse(word), training, range(number, number + 2))
        _save(directory / word, engine.state())
        source = word
        dist.barrier()
        distributed.stop()


def _save(directory: Path, state: dict[str, Tensor]) -> None:
    checkpoints = Checkpoints(directory, every=1, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.wait()


def whole(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, put together from what the safetensors library reads of its files."""
    checkpoint = path_of(directory, 1)
    files = {file.name: load_file(file) for file in checkpoint.glob("*.safetensors")}
    tensors = {}
    for name, entry in json.loads((checkpoint / INDEX).read_text()).items():
        parts = []
        for chunk in entry["chunks"]:
            there = name if chunk["sizes"] == entry["shape"] else f"{name}@{','.join(map(str, chunk['offsets']))}"
            parts.append((chunk["offsets"], files[chunk["file"]][there]))
        tensors[name] = torch.empty(entry["shape"], dtype=parts[0][1].dtype)
        for offsets, part in parts:
            where = [slice(first, first + size) for first, size in zip(offsets, part.shape, strict=True)]
            tensors[name][tuple(where)] = part
        assert sum(part.numel() for _, part in parts) == tensors[name].numel(), name
    return tensors


def assert_nothing_is_lost(directory: Path, training: Training, *words: str) -> None:
    source = ""
    for ranks in sorted({parse(word).world_size for word in words}, reverse=True):
        here = [word for word in words if parse(word).world_size == ranks]
        run_ranks(ranks, _hops, directory, training, source, here, timeout_s=600)
        source = here[-1]
    for before, after in itertools.pairwise(words):
        expected, found = whole(directory / before), whole(directory / f"{after} as loaded")
        assert found.keys() == expected.keys() and len(found) > 50
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert different == [], f"{before} > {after}"


def test_pipeline_tensor_and_data_ranks_load_what_each_other_saved(tmp_path):
    assert_nothing_is_lost(tmp_path, EVERYTHING, "pp2.tp2.mb4", "dp2.tp2.zero3", "pp2.zbv.mb4", "alone")


BALANCED = replace(
    EXPERTS,
    ema=0.9,
    model=replace(EXPERTS.model, moe=replace(EXPERTS.model.moe, first=1, shared=48, selection_bias=True)),
)
MANY = ("pp2.dp2.tp2.zero1.mb2", "cp2.dp2.zero2", "dp_replicate2.dp2.zero3", "pp4.mb4", "tp4", "dp3.zero1", "tp2")
MANY_EXPERTS = ("pp2.dp2.ep2.zero1.mb2", "dp4.ep4.zero3", "dp2.tp2.ep2", "pp4.mb4", "cp2.ep2.zero2", "tp2", "alone")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("training", "words"), [(EVERYTHING, MANY), (BALANCED, MANY_EXPERTS)])
def test_every_kind_of_layout_loads_what_another_saved(tmp_path, training, words):
    assert_nothing_is_lost(tmp_path, training, *words)
