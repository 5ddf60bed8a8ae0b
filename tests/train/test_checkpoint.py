"""Checkpoints are whole or absent, and what comes back is what was saved."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.errors import LongrunError
from parallel import distributed
from tests.ranks import run_ranks
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.committed import CHECKSUMS, CheckpointError, damage, steps
from train.checkpoint.saves import DiskFullError, record


def state(value: float, size: int = 1000) -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.full((size,), float(value)),
        "optimizer.a.exp_avg": torch.full((size, 3), value + 1.0),
        "engine.steps": torch.tensor(int(value)),
    }


def values(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    assert all((tensor == tensor.flatten()[0]).all() for tensor in tensors.values())
    return {name: float(tensor.flatten()[0]) for name, tensor in tensors.items()}


def saved(directory: Path, *numbers: int, keep: int = 9, size: int = 1000) -> Checkpoints:
    distributed.start()
    checkpoints = Checkpoints(directory, every=1, keep=keep)
    for number in numbers:
        checkpoints.save(number, state(number, size), {"step": number, "best": 0.1 + number})
    checkpoints.wait()
    return checkpoints


def _round_trip(directory):
    checkpoints = saved(directory, 3, 7)
    found = state(-1)
    return checkpoints.restore(found), values(found), steps(directory), damage(checkpoints.path(7))


def test_the_newest_checkpoint_comes_back_as_it_was(tmp_path):
    trainer, found, on_disk, wrong = run_ranks(1, _round_trip, tmp_path)[0]
    assert trainer == {"step": 7, "best": 7.1}
    assert found == {"model.a": 7, "optimizer.a.exp_avg": 8, "engine.steps": 7}
    assert on_disk == [3, 7] and wrong == []


def _overwritten(directory):
    distributed.start()
    checkpoints = Checkpoints(directory, every=1, keep=2)
    live = state(5, 500_000)
    for step in (1, 2):  # the second save copies into the same buffers
        live["model.a"].fill_(step)
        checkpoints.save(step, live, {"step": step})
        live["model.a"].fill_(-99)
    checkpoints.wait()
    found = []
    for step in (2, 1):
        target = state(0, 500_000)
        checkpoints.restore(target)
        found.append(float(target["model.a"].mean()))
        shutil.rmtree(checkpoints.path(step))
    return found


def test_training_on_while_a_save_is_under_way_does_not_change_it(tmp_path):
    assert run_ranks(1, _overwritten, tmp_path)[0] == [2.0, 1.0]


def _sharded(directory, write):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    world = distributed.start()
    mesh = init_device_mesh("cpu", (world.size,))
    full = torch.arange(30.0).view(10, 3) if write else torch.zeros(10, 3)
    tensors = {
        "sharded": distribute_tensor(full, mesh, [Shard(0)]),
        "replicated": distribute_tensor(full, mesh, [Replicate()]),
        "plain": full.clone(),
    }
    checkpoints = Checkpoints(directory, every=1, keep=2)
    if write:
        checkpoints.save(1, tensors, {"step": 1})
        checkpoints.wait()
        return None
    checkpoints.restore(tensors)
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).flatten().tolist() for n, t in tensors.items()}


def test_what_three_ranks_saved_loads_on_two_and_on_one(tmp_path):
    run_ranks(3, _sharded, tmp_path, True)
    for ranks in (2, 1):
        for found in run_ranks(ranks, _sharded, tmp_path, False):
            assert found == {name: list(range(30)) for name in ("sharded", "replicated", "plain")}


def _restored(directory):
    checkpoints = saved(directory)
    found = state(-1)
    trainer = checkpoints.restore(found)
    return trainer and (trainer["step"], values(found)["model.a"])


def flip(file: Path, at: int | None = None, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= bit
    file.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda path: flip(path / "rank-00000.safetensors"),
    "a truncated file": lambda path: os.truncate(path / "rank-00000.safetensors", 100),
    "a missing file": lambda path: (path / "rank-00000.safetensors").unlink(),
    "flipped trainer state": lambda path: flip(path / "trainer.json"),
    "no checksums": lambda path: (path / "checksums.json").unlink(),
    "torn checksums": lambda path: os.truncate(path / "checksums.json", 40),
    "emptied checksums": lambda path: (path / "checksums.json").write_text("{}"),
}


def _all_damages(directory):
    """Each kind of damage to step 2; what is restored, and what is said of it."""
    saved(directory / "good", 1, 2)
    found = {}
    for name, harm in DAMAGES.items():
        shutil.copytree(directory / "good", directory / "bad")
        harm(directory / "bad" / "step-00000002")
        found[name] = (_restored(directory / "bad"), damage(directory / "bad" / "step-00000002"))
        shutil.rmtree(directory / "bad")
    return found


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, capfd):
    for name, (restored, reasons) in run_ranks(1, _all_damages, tmp_path)[0].items():
        assert restored == (1, 1.0), name
        assert reasons, name


def _going_on_from_an_earlier_one(directory):
    saved(directory, 10, 20)
    flip(directory / "step-00000020" / "rank-00000.safetensors")
    checkpoints = Checkpoints(directory, every=1, keep=1)
    resumed = checkpoints.restore(state(0))["step"]
    found = []
    for step in (15, 20):  # 20 as it should be
        checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
        found.append((steps(directory), damage(checkpoints.path(step))))
    return resumed, found, (directory / "step-00000020.damaged").is_dir()


def test_a_damaged_checkpoint_displaces_no_good_one_and_its_step_is_saved_again(tmp_path):
    resumed, found, kept = run_ranks(1, _going_on_from_an_earlier_one, tmp_path)[0]
    assert resumed == 10
    assert found == [([15], []), ([20], [])]
    assert kept


def _checked_first(directory):
    def check(trainer):
        raise LongrunError(f"step {trainer['step']} is of another corpus")

    saved(directory, 1)
    target = state(0, size=7)  # another vocabulary
    try:
        Checkpoints(directory, every=1, keep=1).restore(target, check)
    except LongrunError as error:
        return str(error)


def test_what_a_checkpoint_was_made_from_is_judged_before_its_tensors_are_read(tmp_path):
    assert run_ranks(1, _checked_first, tmp_path)[0] == "step 1 is of another corpus"


def _nothing_good(directory):
    try:
        _restored(directory)
    except CheckpointError as error:
        return str(error)


def test_a_run_does_not_begin_anew_when_all_its_checkpoints_are_damaged(tmp_path):
    run_ranks(2, _round_trip, tmp_path)
    for step in (3, 7):
        flip(tmp_path / f"step-{step:08d}" / "rank-00000.safetensors")
    for message in run_ranks(2, _nothing_good, tmp_path):
        assert "step-00000003: rank-00000.safetensors has another checksum" in message and "step-00000007" in message


class Malice:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def zipped(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _pickles(directory):
    """Each file of a checkpoint, and those that a reader of torch's would open, as a pickle, with sound checksums."""
    saved(directory / "good", 1)
    names = [path.name for path in (directory / "good" / "step-00000001").iterdir()]
    assert len(names) == 4
    found = {}
    for name in (*names, ".metadata", "__0_0.distcp", "rank-00001.safetensors"):
        for content in (pickle.dumps(Malice(directory / "mark")), zipped(Malice(directory / "mark"))):
            bad = directory / "bad" / "step-00000001"
            shutil.copytree(directory / "good", directory / "bad")
            (bad / name).write_bytes(content)
            if name != CHECKSUMS:
                recorded = {path.name: record(path) for path in bad.iterdir() if path.name != CHECKSUMS}
                (bad / CHECKSUMS).write_text(json.dumps(recorded))
            found[f"{name} {len(found)}"] = _nothing_good(directory / "bad")
            shutil.rmtree(directory / "bad")
    opened = (directory / "mark").exists()
    pickle.loads(pickle.dumps(Malice(directory / "does it work")))
    assert (directory / "does it work").exists()
    return opened, found


def test_a_pickle_in_place_of_any_file_of_a_checkpoint_is_not_opened(tmp_path):
    [(opened, found)] = run_ranks(1, _pickles, tmp_path)
    assert not opened
    for name, said in found.items():
        harmless = name.startswith(("__0_0", "rank-00001"))  # nothing refers to them
        assert said is None if harmless else "cannot be read" in said or "is a pickle, of an older" in said, name


def _of_an_older_release(directory):
    distributed.start()
    checkpoint = directory / "step-00000001"
    torch.distributed.checkpoint.save(state(1), checkpoint_id=checkpoint)
    (checkpoint / "trainer.json").write_text('{"step": 1}')
    (checkpoint / CHECKSUMS).write_text(json.dumps({path.name: record(path) for path in checkpoint.iterdir()}))
    return _nothing_good(directory)


def test_a_checkpoint_with_a_pickled_index_is_refused_in_so_many_words(tmp_path):
    [said] = run_ranks(1, _of_an_older_release, tmp_path)
    assert "step-00000001: its index (.metadata) is a pickle, of an older release" in said


OTHERS = {
    "another parameter": ({"model.b": torch.zeros(1)}, (), ["parameters only here: b"]),
    "a parameter less": ({}, ("model.a", "optimizer.a.exp_avg"), ["parameters only there: a"]),
    "another optimizer": (
        {"optimizer.a.momentum": torch.zeros(1)},
        ("optimizer.a.exp_avg",),
        [
            "moments only there, of another optimizer: exp_avg",
            "moments only here, of another optimizer: momentum",
        ],
    ),
    "averaged weights": ({"ema.a": torch.zeros(1)}, (), ["averaged weights only here (stage.ema): a"]),
    "another count": ({}, ("engine.steps",), ["only there: engine.steps"]),
    "another width": (
        {"model.a": torch.zeros(1, 7), "optimizer.a.exp_avg": torch.zeros(7)},
        (),
        ["model.a: [1000] there, [1, 7] here"],
    ),
    "many parameters": (
        {f"model.b{n}": torch.zeros(1) for n in range(9)},
        (),
        ["parameters only here: b0, b1, b2, b3, and 5 more"],
    ),
}


def _other_models(directory):
    """What is said of each."""
    checkpoints = saved(directory, 1)
    found = {}
    for name, (more, without, _) in OTHERS.items():
        target = {key: value for key, value in (state(-1) | more).items() if key not in without}
        before = {key: value.clone() for key, value in target.items()}
        try:
            checkpoints.restore(target)
        except CheckpointError as error:
            found[name] = str(error)
        assert all(torch.equal(target[key], before[key]) for key in before)
    return found


def test_the_state_of_another_model_is_refused_by_name_and_shape_before_a_tensor_is_read(tmp_path):
    [found] = run_ranks(1, _other_models, tmp_path)
    assert found.keys() == OTHERS.keys()
    for name, said in found.items():
        assert [line.strip() for line in said.splitlines()[1:-1]] == OTHERS[name][2], name


def _pipeline(directory, layers, ranks_of_a_stage, write):
    """Two stages, each sharded: what `Engine.state()` gives under pp, with an embedding that both hold."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    world = distributed.start()
    mesh = init_device_mesh("cpu", (2, ranks_of_a_stage), mesh_dim_names=("pp", "dp"))
    stage = world.rank // ranks_of_a_stage

    def shared(value, size, placement):
        full = torch.arange(float(size)).view(-1, 2) + value if write else torch.full((size // 2, 2), -1.0)
        return distribute_tensor(full, mesh["dp"], [placement])

    tensors = {"model.embedding": shared(1000, 14, Shard(0)), "engine.steps": torch.tensor(7 if write else 0)}
    for layer in range(layers)[stage::2]:
        tensors[f"model.{layer}"] = shared(100 * layer, 10, Shard(1))
        tensors[f"optimizer.{layer}.step"] = torch.tensor(float(layer) if write else -1)  # plain, of one stage
    if world.rank == world.size - 1:
        tensors["model.alone"] = torch.full((3,), 5.0 if write else -1)
    checkpoints = Checkpoints(directory, every=1, keep=2)
    if write:
        checkpoints.save(1, tensors, {"step": 1})
        checkpoints.wait()
        return damage(checkpoints.path(1))
    try:
        checkpoints.restore(tensors)
    except CheckpointError as error:
        return str(error)
    return {name: getattr(t, "full_tensor", lambda t=t: t)().flatten().tolist() for name, t in tensors.items()}


def test_a_pipeline_whose_ranks_have_other_names_saves_and_loads_the_union(tmp_path):
    assert run_ranks(4, _pipeline, tmp_path, 3, 2, True) == [[]] * 4
    for ranks in (4, 2):
        found = run_ranks(ranks, _pipeline, tmp_path, 3, ranks // 2, False)
        for rank, tensors in enumerate(found):
            layers = (0, 2) if rank < ranks // 2 else (1,)
            alone = {"model.alone": [5.0] * 3} if rank == ranks - 1 else {}
            assert tensors == {
                "model.embedding": [1000.0 + n for n in range(14)],
                "engine.steps": [7],
                **{f"model.{layer}": [100.0 * layer + n for n in range(10)] for layer in layers},
                **{f"optimizer.{layer}.step": [float(layer)] for layer in layers},
                **alone,
            }


def test_what_no_stage_of_a_pipeline_has_is_another_model_to_all_of_them(tmp_path):
    run_ranks(2, _pipeline, tmp_path, 3, 1, True)
    more, fewer = (run_ranks(2, _pipeline, tmp_path, layers, 1, False) for layers in (4, 2))
    assert all("parameters only here: 3\n" in said for said in more)
    assert all("parameters only there: 2\n" in said for said in fewer)


def _half_committed(directory):
    """The last exchange of a save breaks on rank 1 alone, after rank 0 has committed."""
    world = distributed.start()
    checkpoints = Checkpoints(directory, every=1, keep=9, max_failed=1)
    checkpoints.save(1, state(1), {"step": 1})
    if world.rank == 1:
        pending = checkpoints._pending
        wait([pending.future])
        broken = Future()
        broken.set_exception(RuntimeError("Connection closed by peer"))
        checkpoints._pending = replace(pending, future=broken)
    first = checkpoints.wait()
    checkpoints.save(1, state(1), {"step": 1})
    return first, checkpoints.wait(), steps(directory)


def test_a_save_that_went_well_on_some_ranks_only_is_done_again_by_all(tmp_path):
    assert run_ranks(2, _half_committed, tmp_path) == [(False, True, [1])] * 2


def _retention(directory):
    saved(directory, 1, 2, 3, 4, keep=2)
    return sorted(path.name for path in directory.iterdir())


def _milestones(directory):
    distributed.start()
    checkpoints = Checkpoints(directory, every=1, keep=1, keep_every=3)
    for step in range(1, 9):
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    return steps(directory)


def test_those_that_are_kept_for_good_do_not_count_among_the_newest(tmp_path):
    assert run_ranks(1, _milestones, tmp_path)[0] == [3, 6, 8]


def test_only_the_newest_are_kept(tmp_path):
    assert run_ranks(1, _retention, tmp_path)[0] == ["step-00000003", "step-00000004"]


def test_what_a_killed_save_left_is_removed_at_the_start(tmp_path):
    for name in (".step-00000009.tmp", ".step-00000001.old"):
        (tmp_path / name).mkdir()
    assert run_ranks(1, _restored, tmp_path)[0] is None
    assert list(tmp_path.iterdir()) == []


def _failing_write(directory):
    """The save fails in its thread; the next one says so, and that after it works again."""
    checkpoints = saved(directory, 1)
    checkpoints._shelf.temporary(2).write_text("in the way")
    checkpoints.save(2, state(2), {})
    try:
        checkpoints.save(3, state(3), {})
        message = "nothing"
    except CheckpointError as error:
        message = str(error)
    checkpoints._shelf.temporary(2).unlink(missing_ok=True)
    checkpoints.save(4, state(4), {})
    checkpoints.wait()
    return message, steps(directory)


def test_a_failure_of_the_writing_thread_surfaces_at_the_next_save(tmp_path):
    for message, on_disk in run_ranks(2, _failing_write, tmp_path):
        assert "checkpoint of step 2 was not written" in message and "that of step 1" in message
        assert on_disk == [1, 4]


def _full(directory):
    checkpoints = saved(directory, 1, size=50_000)  # 0.8 MB of 1.2
    checkpoints.save(2, state(2, 50_000), {})
    try:
        checkpoints.wait()
    except DiskFullError as error:
        return str(error), steps(directory), damage(checkpoints.path(1)), sorted(p.name for p in directory.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_ends_with_the_bytes_needed_and_keeps_the_checkpoint_before(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", tmp_path], check=True)
    try:
        message, on_disk, wrong, names = run_ranks(1, _full, tmp_path)[0]
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert "0.8 MB needed" in message and "MB free" in message and "step 1" in message
    assert on_disk == [1] and wrong == []
    assert names == ["step-00000001"], "the torn save still takes room"


def _killed_between(directory, point):
    """The process dies at one point of the commit."""
    saved(directory, 1)
    original = getattr(os, point)

    def die(*args):
        if point == "fsync" or Path(args[1]).name.startswith("step-"):
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    setattr(os, point, die)
    checkpoints = Checkpoints(directory, every=1, keep=1)
    checkpoints.save(2, state(2), {"step": 2})
    checkpoints.wait()


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_process_killed_before_the_rename_leaves_the_checkpoint_before(tmp_path, point):
    with pytest.raises(Exception, match="died with exit code -9"):
        run_ranks(1, _killed_between, tmp_path, point)
    assert steps(tmp_path) == [1] and len(list(tmp_path.glob(".step-00000002.*.tmp"))) == 1
    assert run_ranks(1, _restored, tmp_path)[0] == (1, 1.0)


def test_checksums_cover_every_file(tmp_path):
    run_ranks(1, _round_trip, tmp_path)
    path = tmp_path / "step-00000007"
    recorded = json.loads((path / CHECKSUMS).read_text())
    assert {p.name for p in path.iterdir()} == {*recorded, CHECKSUMS}
