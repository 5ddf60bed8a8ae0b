"""A training run changes its engine on the way."""

import signal
from pathlib import Path

import pytest

from tests.train.runs import begin, complete, until
from train.metrics.jsonl import read

LONG = ("stage.steps=12", "stage.checkpoint_every=4", "stage.validate_every=6", "stage.ema=0.9")
MEGATRON = ("engine=megatron", "engine.cpu=true")


def losses(run_dir: Path, key: str) -> list[float]:
    return [line[key] for line in read(run_dir / "metrics.jsonl") if key in line]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_a_run_that_stopped_on_megatron_goes_on_with_the_native_engine_and_agrees(corpus, tmp_path, axis):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    complete(corpus, whole, *LONG)
    running = begin(corpus, parts, *LONG, *MEGATRON, f"parallel.{axis}=2", ranks=2)
    until(lambda: (parts / "checkpoints" / "step-00000004").exists(), running, timeout_s=200)
    running.signal(signal.SIGTERM)
    running.wait()
    assert "resumed from" in complete(corpus, parts, *LONG)
    for key in ("loss", "validation_loss"):
        assert losses(parts, key) == pytest.approx(losses(whole, key), abs=5e-6)


def test_a_dry_run_says_what_megatron_cannot_do(corpus, tmp_path):
    running = begin(corpus, tmp_path / "run", *MEGATRON, "parallel.zero=3", "model.dropout=0.1", "dry_run=true")
    assert running.wait() != [0]
    assert "parallel.zero" in running.output() and "model.dropout" in running.output()
    assert "pretrain into" in complete(corpus, tmp_path / "run", *MEGATRON, "parallel.tp=2", "dry_run=true")
