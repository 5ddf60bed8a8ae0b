"""Two runs never write one directory, also where the kernel's lock does not reach from one machine to the other."""

import json
import signal
from pathlib import Path

from conf.errors import LongrunError
from data_pipeline.lease import FOLDER
from tests.train.runs import Running, begin, complete, until
from tests.train.test_resume import losses

SETTINGS = ("stage.steps=24", "stage.checkpoint_every=4", "stage.keep=20", "failures.lease_s=1.5")


def move_to_another_machine(run_dir: Path, running: Running) -> None:
    """As a second machine sees a run: without its kernel's lock, as a process of another kernel."""
    (run_dir / ".lock").unlink()
    [sign] = (run_dir / FOLDER).glob("0*1")
    sign.write_text(json.dumps(json.loads(sign.read_text()) | {"machine": "another", "host": "node7"}))


def as_it_is(run_dir: Path) -> dict[str, int]:
    """Every file with the time of its last change, but for the signs of life and what each process says of itself."""
    own = {FOLDER, "attempts"}
    files = [file for file in run_dir.rglob("*") if file.is_file() and own.isdisjoint(file.parts)]
    return {str(file): file.stat().st_mtime_ns for file in files}


def test_a_run_that_was_suspended_and_replaced_commits_nothing_when_it_wakes(corpus, tmp_path):
    run_dir = tmp_path / "run"
    zombie = begin(corpus, run_dir, *SETTINGS)
    until(lambda: len(losses(run_dir)) >= 10, zombie)
    zombie.signal(signal.SIGSTOP)
    move_to_another_machine(run_dir, zombie)
    told = complete(corpus, run_dir, *SETTINGS)
    assert "on node7: waiting 1.5 s for its signs" in told and "resumed from" in told
    left = as_it_is(run_dir)
    zombie.signal(signal.SIGCONT)
    assert zombie.wait(timeout_s=20) == [LongrunError.exit_code]
    assert "was taken over by process" in zombie.output() and "It writes no more" in zombie.output()
    assert as_it_is(run_dir) == left
    assert [step for step, _ in losses(run_dir)] == list(range(1, 25))
