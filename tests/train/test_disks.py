"""Disks that are full, read-only, slow or gone, on real mounts: what is committed stays, and training goes on."""

import errno
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from data_pipeline.artifact import ArtifactError, locked
from parallel import distributed
from tests.ranks import run_ranks
from tests.train.kills import composed, start
from tests.train.test_checkpoint import flip, saved, state, values
from tests.train.test_resume import assert_same_run
from train.checkpoint import shelf
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.committed import CheckpointError, FencedError, steps
from train.metrics.jsonl import read


def mounts() -> bool:
    """Whether file systems can be mounted here."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(
    not mounts(), reason="not root, or no right to mount: no disk was filled or taken away"
)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def unmount(directory: Path) -> None:
    subprocess.run(["umount", "-l", directory], check=True)


def opened(directory: Path, max_failed: int = 9) -> tuple[Checkpoints, list[str]]:
    """Checkpoints, and what they will have told."""
    distributed.start()
    told: list[str] = []
    checkpoints = Checkpoints(directory, every=1, keep=2, max_failed=max_failed)
    checkpoints.alert = lambda kind, text: told.append(f"{kind}: {text}")
    return checkpoints, told


def save(checkpoints: Checkpoints, step: int, size: int = 1000) -> None:
    """And see it through."""
    checkpoints.save(step, state(step, size), {"step": step})
    assert checkpoints._pending is not None
    checkpoints._await(checkpoints._pending)


def newest(directory: Path) -> float:
    found = state(-1)
    Checkpoints(directory, every=1, keep=2).restore(found)
    return values(found)["model.a"]


def _filled(directory):
    checkpoints, told = opened(directory)
    ballast = directory / "ballast"
    for step in (1, 2, 3, 4):
        if step == 2:
            ballast.write_bytes(bytes(3_000_000))
        if step == 4:
            ballast.unlink()
        save(checkpoints, step, 50_000)  # 0.8 MB of 4
    checkpoints.wait()
    return told, steps(directory), sorted(path.name for path in directory.iterdir())


@needs_mounts
def test_what_does_not_fit_on_a_disk_is_told_and_left_out_until_there_is_room(tmp_path):
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path)
    try:
        told, on_disk, names = run_ranks(1, _filled, tmp_path)[0]
    finally:
        unmount(tmp_path)
    assert [text[: text.index(" in /")] for text in told] == [
        f"fault: no room for the checkpoint of step {step}" for step in (2, 3)
    ]
    assert all("The newest good one is that of step 1" in text for text in told)
    assert on_disk == [1, 4] and names == ["step-00000001", "step-00000004"]


def _read_only(directory):
    checkpoints, told = opened(directory / "checkpoints", max_failed=1)
    save(checkpoints, 1)
    mount("-o", "remount,ro", directory)
    save(checkpoints, 2)
    save(checkpoints, 3)
    with pytest.raises(CheckpointError, match=r"step 3 was not written: .*Read-only.*step 1.*Mend that"):
        checkpoints.save(4, state(4), {"step": 4})
    with pytest.raises(CheckpointError) as at_start:
        opened(directory / "checkpoints")
    mount("-o", "remount,rw", directory)
    return told, str(at_start.value), newest(directory / "checkpoints")


@needs_mounts
def test_a_disk_that_turns_read_only_is_borne_so_many_saves_and_refused_at_a_start(tmp_path):
    mount("-t", "tmpfs", "tmpfs", tmp_path)
    try:
        told, at_start, good = run_ranks(1, _read_only, tmp_path)[0]
    finally:
        unmount(tmp_path)
    assert len(told) == 2 and all("Read-only file system" in text and "of step 1" in text for text in told)
    assert "rank 0: Read-only file system. Is its file system mounted" in at_start
    assert good == 1


@needs_mounts
def test_a_run_directory_that_is_read_only_is_one_error(tmp_path):
    mount("-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path)
    try:
        for run_dir in (tmp_path, tmp_path / "run"):
            with (
                pytest.raises(ArtifactError, match=r"Read-only file system.*mounted, and not read-only"),
                locked(run_dir),
            ):
                pass
    finally:
        unmount(tmp_path)


def _vanished(disk, place):
    mount("--bind", disk, place)
    checkpoints, told = opened(place / "checkpoints")
    save(checkpoints, 1)
    unmount(place)
    save(checkpoints, 2)
    (place / "checkpoints").mkdir()  # as a start without the mount would
    save(checkpoints, 3)
    below = [path.name for path in (place / "checkpoints").iterdir()]
    (place / "checkpoints").rmdir()
    mount("--bind", disk, place)
    save(checkpoints, 4)
    checkpoints.wait()
    unmount(place)
    return told, below, steps(disk / "checkpoints")


@needs_mounts
def test_a_mount_that_vanishes_is_told_at_once_and_used_again_when_it_is_back(tmp_path):
    disk, place = tmp_path / "disk", tmp_path / "place"
    disk.mkdir()
    place.mkdir()
    told, below, on_disk = run_ranks(1, _vanished, disk, place)[0]
    assert len(told) == 2
    for text in told:
        assert f"{place}/checkpoints has vanished" in text
        assert f"that of step 1: {place}/checkpoints/step-00000001" in text
    assert below == [], "written to what lies below the mount"
    assert on_disk == [1, 4]


def _fenced(directory):
    checkpoints, told = opened(directory)
    save(checkpoints, 1)
    checkpoints._shelf.fence = taken_over
    save(checkpoints, 2)
    with pytest.raises(FencedError, match="taken over by another"):
        checkpoints.save(3, state(3), {"step": 3})
    return told, sorted(path.name for path in directory.iterdir())


def taken_over() -> None:
    raise FencedError("taken over by another")


def test_a_run_whose_directory_was_taken_over_commits_nothing_and_ends(tmp_path):
    [(told, names), _] = run_ranks(2, _fenced, tmp_path)
    assert names == ["step-00000001"]
    assert told == ["fault: taken over by another"]


def _asleep(directory):
    checkpoints, told = opened(directory)
    save(checkpoints, 1)

    def take_over() -> None:
        """What another run does while this one sleeps, its fence just passed."""
        for unfinished in directory.glob(".step-*"):
            shutil.rmtree(unfinished)
        shutil.copytree(checkpoints.path(1), checkpoints.path(2), dirs_exist_ok=True)

    checkpoints._shelf.fence = take_over
    save(checkpoints, 2)
    with pytest.raises(FencedError, match="step-00000002 is there, and this run did not write it"):
        checkpoints.wait()
    return told, steps(directory)


def test_a_run_that_slept_past_its_fence_takes_no_step_from_the_one_that_took_over(tmp_path):
    [(told, on_disk)] = run_ranks(1, _asleep, tmp_path)
    assert on_disk == [1, 2] and len(told) == 1


def _unsynced(directory):
    checkpoints, told = opened(directory)
    sync, shelf.sync = shelf.sync, failing
    save(checkpoints, 1)
    shelf.sync = sync
    assert not checkpoints.wait()
    save(checkpoints, 1)
    return checkpoints.wait(), told, sorted(path.name for path in directory.iterdir())


def failing(directory: Path) -> None:
    raise OSError(errno.EIO, "the disk is away")


def test_a_step_whose_own_commit_was_not_synced_stays_and_is_synced_when_it_is_saved_again(tmp_path):
    [(committed, told, names)] = run_ranks(1, _unsynced, tmp_path)
    assert committed and len(told) == 1 and names == ["step-00000001"]


def _slow(directory):
    """The real thing needs a slow device; this one sleeps in fsync, which is what a slow device does to a save."""
    checkpoints, told = opened(directory)
    sync = os.fsync
    os.fsync = lambda number: (time.sleep(0.6), sync(number))[1]
    calls = []
    for step in (1, 2):
        begun = time.perf_counter()
        checkpoints.save(step, state(step), {"step": step})
        calls.append(time.perf_counter() - begun)
    os.fsync = sync
    checkpoints.wait()
    return calls, told, steps(directory)


def test_a_slow_disk_holds_up_no_step_before_the_next_save_and_that_one_says_so(tmp_path):
    [(calls, told, on_disk)] = run_ranks(1, _slow, tmp_path)
    assert calls[0] < 0.6 < calls[1]
    assert told and all("waited" in text and "checkpoint of step 1 is still being" in text for text in told)
    assert on_disk == [1, 2]


def _bad_places(directory):
    found = {}
    for name in ("file", "gone"):
        try:
            opened(directory / name)
        except CheckpointError as error:
            found[name] = str(error)
    return found


def test_a_place_that_is_no_directory_is_one_error_on_all_ranks_before_anything_starts(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "not mounted" / "checkpoints")
    for found in run_ranks(2, _bad_places, tmp_path):
        assert all("no checkpoint can be written to" in said and "mounted" in said for said in found.values())
        assert found.keys() == {"file", "gone"}


@needs_mounts
def test_a_run_whose_checkpoints_vanish_for_a_while_ends_as_if_they_had_not(corpus, tmp_path):
    settings = ("stage.steps=8", "stage.checkpoint_every=2", "stage.ema=0.9")
    run = composed(corpus, *settings, ranks=1)
    disk, there, gone = tmp_path / "disk", tmp_path / "there", tmp_path / "gone"
    disk.mkdir()
    (gone / "checkpoints").mkdir(parents=True)
    assert start(run, there, 1, None, 0, tmp_path / "tally")[0] == [0]
    mount("--bind", disk, gone / "checkpoints")
    watcher = subprocess.Popen(
        f"while [ ! -e {disk}/step-00000002 ]; do sleep 0.01; done; umount -l {gone}/checkpoints; "
        f"while ! grep -q vanished {gone}/alerts.jsonl; do sleep 0.01; done; mount --bind {disk} {gone}/checkpoints",
        shell=True,
    )
    try:
        codes, said = start(run, gone, 1, None, 0, tmp_path / "tally")
        watcher.wait(10)
        assert codes == [0], said
        assert_same_run(gone, there)
        assert [line["kind"] for line in read(gone / "alerts.jsonl")][:1] == ["fault"]
        assert steps(gone / "checkpoints")[-1] == 8
    finally:
        watcher.kill()
        unmount(gone / "checkpoints")


FILES = ("rank-00000.safetensors", "rank-00001.safetensors", "index.json", "trainer.json", "checksums.json")


def harm(dice: random.Random, directory: Path, step: int) -> str:
    """Damage one file of a checkpoint in one of the ways that disks do, or the whole of it."""
    checkpoint = directory / f"step-{step:08d}"
    kind = dice.choice(["flip", "truncate", "empty", "remove", "longer", "swap", "zeros", "other", "lost"])
    # All steps of a run have the same index.
    file = checkpoint / dice.choice([name for name in FILES if kind != "swap" or name != "index.json"])
    size = file.stat().st_size
    at = dice.choice([0, 8, size // 2, size - 1])
    if kind == "flip":
        flip(file, at, 1 << dice.randrange(8))
    elif kind == "truncate":
        os.truncate(file, dice.choice([1, size // 2, size - 1]))
    elif kind == "empty":
        os.truncate(file, 0)
    elif kind == "remove":
        file.unlink()
    elif kind == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    elif kind == "swap":
        shutil.copy(directory / f"step-{step - 1:08d}" / file.name, file)
    elif kind == "zeros":
        content = file.read_bytes()
        file.write_bytes(content[:at] + bytes(size - at) if content[at:].strip(b"\0") else bytes(size))
    elif kind == "other":  # all of it is that of another step
        shutil.rmtree(checkpoint)
        shutil.copytree(directory / f"step-{step - 1:08d}", checkpoint)
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    return f"{kind} {file.name} {at}"


def _random_damage(directory, cases):
    """What was done to each step, which one came back, and what was said."""
    rank = distributed.start().rank
    saved(directory / "good", 1, 2, 3, 4)
    found = []
    for case in range(cases):
        dice, there = random.Random(case), directory / f"case{case}"
        harmed = sorted(dice.sample([2, 3, 4], dice.randint(1, 3)))
        if rank == 0:
            shutil.copytree(directory / "good", there)
            for step in (1, 2, 3, 4)[::-1]:
                if step in harmed:
                    harmed[harmed.index(step)] = (step, harm(dice, there, step))
            for left in (".step-00000005.tmp", ".step-00000006.tmp"):
                shutil.copytree(there / "step-00000001", there / left)
            (there / ".ready").touch()
        while not (there / ".ready").exists():
            time.sleep(0.001)
        checkpoints = Checkpoints(there, every=1, keep=9)
        target = state(-1)
        trainer = checkpoints.restore(target)
        found.append((harmed, trainer, values(target)["model.a"], sorted(path.name for path in there.iterdir())))
    return found


def test_of_checkpoints_damaged_at_random_the_newest_good_one_is_chosen_and_the_rest_are_named(tmp_path):
    cases = 60
    for harmed, trainer, value, names in run_ranks(2, _random_damage, tmp_path, cases)[0]:
        damaged = {step for step, _ in harmed}
        good = max({1, 2, 3, 4} - damaged)
        assert trainer["step"] == value == good, harmed
        aside = {f"step-{step:08d}.damaged" for step in damaged if step > good}
        kept = {f"step-{step:08d}" for step in (1, 2, 3, 4) if step <= good}
        assert set(names) - {".ready"} == aside | kept, harmed
