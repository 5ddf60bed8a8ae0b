"""A run goes on with any number of processes: the same samples, the same losses."""

import signal
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from parallel import launch
from parallel.launch import Place
from tests.train.runs import begin, complete, until
from tests.train.test_resume import losses
from train.metrics.jsonl import read
from train.stages.base import STOPPED_EARLY

SETTINGS = ("parallel=elastic", "parallel.micro_batches=${micro_batches_of:2}", "stage.steps=18", "model.dropout=0.1")


@pytest.mark.parametrize(("processes", "expected"), [(1, 8), (2, 4), (4, 2), (8, 1), (16, 1), (3, 5)])
def test_micro_batches_keep_their_size_whatever_the_number_of_processes(monkeypatch, processes, expected):
    monkeypatch.setattr(launch, "place", lambda: replace(Place(), size=processes))
    config = OmegaConf.create({"stage": {"global_batch": 16}, "micro_batches": "${micro_batches_of:2}"})
    assert config.micro_batches == expected


def test_a_run_that_shrinks_and_grows_trains_as_one_that_did_not(corpus, tmp_path):
    complete(corpus, tmp_path / "whole", *SETTINGS)
    run_dir = tmp_path / "run"
    for ranks, steps in ((2, 5), (1, 11)):
        running = begin(corpus, run_dir, *SETTINGS, ranks=ranks)
        until(lambda steps=steps: len(losses(run_dir)) >= steps, running)
        running.signal(signal.SIGTERM, rank=0)  # one is asked, all stop
        assert running.wait() == [STOPPED_EARLY] * ranks, running.output()
    complete(corpus, run_dir, *SETTINGS, ranks=2)
    found, expected = losses(run_dir), losses(tmp_path / "whole")
    assert [step for step, _ in found] == list(range(1, 19))
    assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) <= 5e-6
    samples = [line["samples"] for line in read(run_dir / "metrics.jsonl") if "samples" in line]
    assert samples == [8 * step for step in range(1, 19)]
