"""Two machines cannot write one directory: the live one keeps it, a still one loses it, one that wakes is told."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_pipeline import lease
from data_pipeline.artifact import ArtifactError, locked
from data_pipeline.lease import FOLDER, Holder, Lease, LiveRunError

STALE_S = 0.6


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch):
    """From here on, this process is one of another machine."""

    def move(name: str) -> None:
        monkeypatch.setattr(lease, "_machine", lambda: name)

    return move


def leave(directory: Path, number: int = 1, **what) -> Path:
    """The sign of a holder on another machine that was cut off."""
    (directory / FOLDER).mkdir(exist_ok=True)
    file = directory / FOLDER / f"{number:08d}"
    holder = replace(Holder("node7", "another", 123, "45", STALE_S), **what)
    file.write_text(json.dumps(asdict(holder)))
    return file


def test_a_live_holder_on_another_machine_keeps_the_directory(tmp_path, elsewhere):
    held = Lease(tmp_path, STALE_S)
    elsewhere("another")
    with pytest.raises(LiveRunError, match=rf"is being written by process {os.getpid()} on "):
        Lease(tmp_path, STALE_S)
    held.check()
    held.close()


def test_a_still_holder_loses_the_directory_after_the_time_it_gave_itself(tmp_path, capsys):
    leave(tmp_path)
    start = time.monotonic()
    taken = Lease(tmp_path)
    assert STALE_S < time.monotonic() - start < 5 * STALE_S and taken.number == 2
    assert "was held by process 123 on node7 (job 45): waiting 0.6 s for its signs" in capsys.readouterr().out
    taken.close()


@pytest.mark.parametrize("what", [{"released": True}, {"machine": lease._machine()}])
def test_one_that_ended_or_was_killed_on_this_machine_is_not_waited_for(tmp_path, what):
    leave(tmp_path, stale_s=60.0, **what)
    Lease(tmp_path).close()


def test_an_unreadable_sign_is_waited_for_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", STALE_S)
    leave(tmp_path).write_text("{")
    taken = Lease(tmp_path)
    assert taken.number == 2
    taken.close()


def test_whoever_was_taken_over_may_not_commit_and_is_told_by_whom(tmp_path):
    held = Lease(tmp_path)
    leave(tmp_path, number=2)
    with pytest.raises(LiveRunError, match="was taken over by process 123 on node7"):
        held.check()
    held.close()


def test_a_number_is_taken_once(tmp_path):
    """Two that saw the same holder go."""
    first, second = Lease(tmp_path), Lease(tmp_path)
    assert (first.number, second.number) == (1, 2)
    with pytest.raises(LiveRunError):
        first.check()
    first.close()
    second.close()


def test_a_process_that_wakes_up_to_find_itself_replaced_ends(tmp_path):
    code = (
        f"from data_pipeline.artifact import locked; import time\nwith locked({str(tmp_path)!r}, 0.6): time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / FOLDER).glob("0*1")):
        time.sleep(0.01)
    leave(tmp_path, number=2)
    _, told = process.communicate(timeout=10)
    assert process.returncode == LiveRunError.exit_code and "taken over by process 123 on node7" in told


def test_a_directory_that_was_removed_meanwhile_is_left_in_peace(tmp_path):
    with locked(tmp_path / "run") as held:
        for file in [*(tmp_path / "run" / FOLDER).iterdir()]:
            file.unlink()
        (tmp_path / "run" / FOLDER).rmdir()
    assert held.number == 1


def holding(directory: Path, seconds: float) -> subprocess.Popen:
    """A process that has the kernel's lock for so long, as a file server has for a machine that is gone."""
    script = (
        "import fcntl, sys, time; stream = open(sys.argv[1] + '/.lock', 'a+'); fcntl.flock(stream, fcntl.LOCK_EX); "
        "print('locked', flush=True); time.sleep(float(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, directory, str(seconds)], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_the_lock_of_a_machine_that_is_gone_is_waited_for(tmp_path, capsys):
    leave(tmp_path)
    with holding(tmp_path, 1.0), locked(tmp_path, STALE_S):
        assert "is locked for process 123 on node7 (job 45): waiting" in capsys.readouterr().out


@pytest.mark.parametrize("what", [{"machine": lease._machine()}, {"beats": -1}])
def test_the_lock_of_whoever_lives_is_not_waited_for(tmp_path, monkeypatch, what):
    sign = leave(tmp_path, **what)
    if "beats" in what:  # it says something meanwhile
        later = [lease._read(sign), replace(lease._read(sign), beats=1)]
        monkeypatch.setattr(lease, "_newest", lambda _: later.pop(0))
    with holding(tmp_path, 30) as process:
        with pytest.raises(LiveRunError, match="is being written by"), locked(tmp_path, STALE_S):
            pass
        process.kill()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lease.fcntl, "flock", refuse)
    with pytest.raises(ArtifactError, match=r"cannot be held \(No locks available, errno 37\)"), locked(tmp_path):
        pass
