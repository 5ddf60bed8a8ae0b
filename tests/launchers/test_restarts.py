"""Restarts are paid for by checkpoints."""

from launchers.restarts import Restarts, newest_step
from train.checkpoint.committed import damaged_of, path_of


def test_only_committed_checkpoints_count(tmp_path):
    assert newest_step(tmp_path / "absent") == -1
    path_of(tmp_path, 4).mkdir()
    damaged_of(tmp_path, 8).mkdir()
    (tmp_path / ".step-00000012.17a.tmp").mkdir()
    assert newest_step(tmp_path) == 4


def test_a_new_checkpoint_pays_for_the_restarts_before_it(tmp_path):
    restarts = Restarts(tmp_path, limit=2)
    assert [restarts.another() for _ in range(3)] == [True, True, False]
    path_of(tmp_path, 4).mkdir()
    assert [restarts.another() for _ in range(3)] == [True, True, False]
    assert restarts.count == 4 and restarts.starts == "3 times without a new checkpoint in between"


def test_a_checkpoint_after_the_newest_was_damaged_pays_too(tmp_path):
    path_of(tmp_path, 8).mkdir()
    restarts = Restarts(tmp_path, limit=1)
    assert restarts.another()
    path_of(tmp_path, 8).rename(damaged_of(tmp_path, 8))
    path_of(tmp_path, 4).mkdir()
    assert restarts.another()
