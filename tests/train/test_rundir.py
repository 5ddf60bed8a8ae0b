"""All ranks of a run are started alike, or none trains."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel import distributed
from tests.ranks import run_ranks
from tests.train.runs import begin
from train import rundir
from train.optim.adam8bit import Adam8bit
from train.optim.adamw import AdamW
from train.optim.adamw_apex import AdamWApex
from train.optim.schedules import Cosine, Linear
from train.rundir import DisagreementError, check_agreement, recipe, source_digests, with_options


def test_ranks_with_other_configurations_are_refused_with_the_keys_that_differ(corpus, tmp_path):
    run_dir = tmp_path / "run"
    settings = ("parallel.dp_shard=3", "parallel.zero=1", "stage.global_batch=6", "stage.steps=2")
    running = begin(corpus, run_dir, *settings, ranks=3, last=("optim.lr=0.5", "parallel.micro_batches=2"))
    assert running.wait() == [1, 1, 1]
    said = running.output(0)
    assert "error: the ranks of this run were not started alike" in said
    assert "optim.lr: 0.0003 on rank 0-1, 0.5 on rank 2" in said
    assert "parallel.micro_batches: 1 on rank 0-1, 2 on rank 2" in said
    assert "seed" not in said and "Traceback" not in said
    assert "error" not in running.output(1) + running.output(2)
    assert not run_dir.exists()


def of_other_code(tree: Path) -> str:
    """Rank 1 runs another file, and one more."""
    rank = int(os.environ["RANK"])
    for room in rundir.ROOMS:
        (tree / str(rank) / room).mkdir(parents=True)
    (tree / str(rank) / "train" / "loop.py").write_text(f"step = {rank}")
    if rank == 1:
        (tree / str(rank) / "conf" / "more.py").write_text("")
    rundir.__file__ = str(tree / str(rank) / "train" / "rundir.py")
    distributed.start()
    try:
        check_agreement({"seed": 3, "parallel": {"tp": 1}})
    except DisagreementError as error:
        return str(error)
    except SystemExit as end:
        return f"exit {end.code}"
    return "nothing"


def test_ranks_with_other_code_are_refused_with_the_files_that_differ(tmp_path):
    first, second = run_ranks(2, of_other_code, tmp_path)
    assert "code conf/more.py: absent on rank 0, 'e3b0c44298fc' on rank 1" in first
    assert "code train/loop.py: " in first and "seed" not in first
    assert second == "exit 1"


def agreed() -> bool:
    distributed.start()
    check_agreement({"seed": 3})
    return True


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_were_started_alike_agree(ranks):
    assert run_ranks(ranks, agreed) == [True] * ranks


def test_the_code_is_every_file_that_a_stage_may_run():
    found = source_digests()
    assert {"train/loop.py", "parallel/layout.py", "conf/entry.py", "data_pipeline/loader.py"} <= found.keys()


def test_options_with_the_same_fields_make_different_runs_but_for_those_that_continue_each_other():
    values = {"optim": {"lr": 0.1}, "schedule": {"warmup": 0}, "engine": {}}

    def recipe_of(optim, schedule):
        config = SimpleNamespace(optim=optim, schedule=schedule, model=None, data=None, objective=None)
        return recipe(with_options(config, values))

    adamw = recipe_of(AdamW(), Cosine())
    assert adamw != recipe_of(Adam8bit(), Cosine())
    assert adamw != recipe_of(AdamW(), Linear())
    assert adamw == recipe_of(AdamWApex(), Cosine())
