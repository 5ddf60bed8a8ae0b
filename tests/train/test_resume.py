"""A run that was stopped goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conf.errors import ConfigError, OccupiedError
from data_pipeline.artifact import Artifact
from parallel.layout import Layout
from tests.train.runs import begin, complete, until
from train.checkpoint.committed import CheckpointError
from train.metrics.jsonl import read
from train.models.transformer import DecoderConfig
from train.stages.base import STOPPED_EARLY
from train.start import Start

LONG = ("stage.steps=16", "stage.checkpoint_every=4", "stage.validate_every=6", "model.dropout=0.1", "stage.ema=0.9")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read(run_dir / "metrics.jsonl") if "loss" in line]


def validations(run_dir: Path) -> list[tuple[int, float]]:
    lines = read(run_dir / "metrics.jsonl")
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def assert_same_run(found: Path, expected: Path) -> None:
    """The same figures at every step, each step once, and the same bits at the end."""
    assert losses(found) == losses(expected)
    assert validations(found) == validations(expected)
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert Artifact.read(found).id == Artifact.read(expected).id


@pytest.fixture(scope="session")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    complete(corpus, run_dir, *LONG)
    return run_dir


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)])
def test_a_stop_signal_ends_with_code_75_and_the_restart_is_bit_identical(corpus, tmp_path, uninterrupted, number):
    run_dir = tmp_path / "run"
    running = begin(corpus, run_dir, *LONG)
    until(lambda: len(losses(run_dir)) >= 7, running)
    running.signal(number)
    assert running.wait() == [STOPPED_EARLY]
    assert signal.Signals(number).name in running.output() and "start the same command again" in running.output()
    assert not (run_dir / "manifest.json").exists()
    assert "resumed from" in complete(corpus, run_dir, *LONG)
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adam8bit", "muon"])
def test_eight_bit_moments_sharded_matrices_and_the_history_of_spikes_survive_a_stop(corpus, tmp_path, optim):
    spikes = ("guard.spike_strength=3", "guard.spike_window=4", "guard.max_skipped=16")
    settings = (*LONG, f"optim={optim}", *spikes, "parallel.dp_shard=2", "parallel.zero=3")
    complete(corpus, tmp_path / "whole", *settings, ranks=2)
    running = begin(corpus, tmp_path / "run", *settings, ranks=2)
    until(lambda: len(losses(tmp_path / "run")) >= 7, running)
    running.signal(signal.SIGTERM)
    assert running.wait() == [STOPPED_EARLY] * 2
    complete(corpus, tmp_path / "run", *settings, ranks=2)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_signal_to_one_rank_stops_all_at_the_same_step(corpus, tmp_path):
    run_dir = tmp_path / "run"
    settings = ("parallel.dp_shard=2", "parallel.zero=1", "stage.steps=500", "stage.checkpoint_every=0")
    running = begin(corpus, run_dir, *settings, ranks=2)
    until(lambda: len(losses(run_dir)) >= 3, running)
    running.signal(signal.SIGTERM, rank=1)
    assert running.wait() == [STOPPED_EARLY] * 2
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{losses(run_dir)[-1][0]:08d}"]


ELSEWHERE = [
    (("parallel.dp_shard=2", "parallel.zero=3"), ()),
    (("parallel.pp=2", "parallel.micro_batches=2"), ("parallel.tp=2",)),
    pytest.param(
        ("parallel.cp=2", "parallel.ring=true"),
        ("parallel.pp=2", "parallel.schedule=gpipe", "parallel.micro_batches=4"),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("first", "second"), ELSEWHERE)
def test_a_run_resumed_at_another_layout_sees_the_same_samples_and_agrees(
    corpus, tmp_path, uninterrupted, first, second
):
    run_dir = tmp_path / "run"
    running = begin(corpus, run_dir, *LONG, *first, ranks=2)
    until(lambda: (run_dir / "checkpoints" / "step-00000008").exists(), running)
    running.signal(signal.SIGTERM)
    assert running.wait() == [STOPPED_EARLY] * 2
    complete(corpus, run_dir, *LONG, *second, ranks=2 if second else 1)
    lines = [line for line in read(run_dir / "metrics.jsonl") if "loss" in line]
    assert [line["samples"] for line in lines] == [8 * step for step in range(1, 17)]
    expected = [line for line in read(uninterrupted / "metrics.jsonl") if "loss" in line]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=5e-6)


def test_a_finished_run_is_not_run_again(corpus, uninterrupted):
    before = (uninterrupted / "manifest.json").stat().st_mtime_ns
    assert "nothing to do" in complete(corpus, uninterrupted, *LONG, "stage.keep=5", "logger=[]")
    assert (uninterrupted / "manifest.json").stat().st_mtime_ns == before


def test_another_configuration_is_refused_with_the_keys_that_differ(corpus, uninterrupted, tmp_path):
    running = begin(corpus, uninterrupted, *LONG, "optim.lr=0.5", "seed=3")
    assert running.wait() == [OccupiedError.exit_code]
    assert "optim.lr: 0.0003 there, 0.5 now" in running.output() and "seed: 0 there, 3 now" in running.output()
    assert "stage.steps:" not in running.output() and "Traceback" not in running.output()


def test_a_checkpoint_of_other_inputs_is_refused(corpus, tmp_path):
    run_dir = tmp_path / "run"
    begin(corpus, run_dir, "stage.steps=2").wait()
    (run_dir / "manifest.json").unlink()
    manifest = json.loads((corpus / "manifest.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer", "shards"):
        (other / name).symlink_to(corpus / name)
    (other / "manifest.json").write_text(json.dumps({**manifest, "id": "0123456789abcdef"}))
    running = begin(other, run_dir, "stage.steps=2")
    assert running.wait() == [OccupiedError.exit_code]
    assert "other inputs" in running.output() and "0123456789abcdef" in running.output()


def test_resume_never_refuses_a_directory_with_checkpoints(corpus, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-00000004").mkdir(parents=True)
    running = begin(corpus, run_dir, *LONG, "resume=never")
    assert running.wait() == [OccupiedError.exit_code]
    assert "resume=auto" in running.output()


def test_resume_must_refuses_a_directory_without_checkpoints(corpus, tmp_path):
    running = begin(corpus, tmp_path / "run", *LONG, "resume=must")
    assert running.wait() == [CheckpointError.exit_code]
    assert "holds no checkpoint, and resume=must. Is its file system mounted?" in running.output()


def test_a_second_run_in_a_live_directory_is_refused_on_every_rank_and_harms_nothing(corpus, tmp_path):
    run_dir = tmp_path / "run"
    first = begin(corpus, run_dir, "stage.steps=2000", "stage.checkpoint_every=0")
    until(lambda: len(losses(run_dir)) >= 2, first)
    second = begin(corpus, run_dir, "stage.steps=2000", "parallel.dp_shard=2", "parallel.zero=1", ranks=2)
    assert second.wait() == [1, 1]
    assert f"is being written by process {first.processes[0].pid}" in second.output(0)
    assert "error" not in second.output(1)
    first.signal(signal.SIGTERM)
    assert first.wait() == [STOPPED_EARLY]


def test_a_run_stops_when_the_loss_is_not_finite_and_names_the_last_checkpoint(corpus, tmp_path):
    run_dir = tmp_path / "run"
    running = begin(
        corpus,
        run_dir,
        "stage.steps=40",
        "optim.lr=1e30",
        "stage.checkpoint_every=1",
        "guard.nonfinite=skip",
        "guard.max_skipped=2",
    )
    assert running.wait() == [1]
    assert "number 3 in a row" in running.output() and "The last checkpoint is" in running.output()
    assert "Traceback" not in running.output()
    assert not (run_dir / "manifest.json").exists()
    assert any((run_dir / "checkpoints").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_full_at_the_end_ends_the_run_with_a_message_and_it_goes_on_once_there_is_room(corpus, tmp_path):
    """Room for one checkpoint (1.4 MB), not for two."""
    run_dir = tmp_path / "disk" / "run"
    run_dir.parent.mkdir()
    settings = ("stage.steps=6", "stage.checkpoint_every=2", "stage.keep=1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", run_dir.parent], check=True)
    try:
        running = begin(corpus, run_dir, *settings, logs=tmp_path)
        assert running.wait() == [1]
        said = running.output()
        assert "no room for the checkpoint of step 4" in said and "Training goes on" in said and "MB needed" in said
        assert "error: no room for the checkpoint of step 6" in said and "that of step 2" in said
        assert "Traceback" not in said
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000002"]
        subprocess.run(["mount", "-o", "remount,size=64m", run_dir.parent], check=True)
        assert "resumed from" in complete(corpus, run_dir, *settings, logs=tmp_path)
        assert [step for step, _ in losses(run_dir)] == [1, 2, 3, 4, 5, 6]
    finally:
        subprocess.run(["umount", run_dir.parent], check=True)


def test_validation_without_gain_ends_the_run_early_with_an_artifact(corpus, tmp_path):
    run_dir = tmp_path / "run"
    settings = ("stage.steps=200", "optim.lr=1e-30", "stage.validate_every=2", "stage.patience=3", "schedule=constant")
    printed = complete(corpus, run_dir, *settings)
    assert "3 validations without a better loss" in printed
    assert Artifact.read(run_dir, "pretrain").metrics["steps"] == 6
    assert [step for step, _ in validations(run_dir)] == [0, 2, 4, 6]


def test_fine_tuning_starts_from_the_weights_of_another_run(corpus, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    complete(corpus, run_dir, "stage.steps=2", f"init_from={uninterrupted}", "optim.lr=1e-30", "model.layers=7")
    one, other = weights(run_dir), weights(uninterrupted)
    assert all(torch.equal(one[name], other[name]) for name in other)
    artifact = Artifact.read(run_dir)
    assert artifact.inputs["model"]["id"] == Artifact.read(uninterrupted).id


def test_a_layout_that_cannot_divide_the_model_it_starts_from_is_refused(corpus, uninterrupted):
    config = SimpleNamespace(
        data=SimpleNamespace(path=corpus, sequence_length=32),
        init_from=uninterrupted,
        model=DecoderConfig(heads=3),
        parallel=Layout(tp=3, pp=9),
    )
    with pytest.raises(ConfigError, match=r"(?s)parallel.tp=3: must divide the model's 4 query heads.*parallel.pp=9"):
        Start.of(config)


def test_samples_longer_than_the_context_of_the_model_are_refused(corpus, tmp_path):
    running = begin(corpus, tmp_path / "run", "stage.steps=1", "data.sequence_length=64", "model.max_positions=32")
    assert running.wait() == [1]
    assert "32 tokens (model.max_positions)" in running.output() and "Traceback" not in running.output()


def test_other_weights_of_the_same_shape_are_other_inputs(corpus, uninterrupted, tmp_path):
    ours, theirs, run_dir = tmp_path / "ours", tmp_path / "theirs", tmp_path / "run"
    shutil.copytree(uninterrupted / "model", ours)
    shutil.copytree(ours, theirs)
    content = bytearray((theirs / "model.safetensors").read_bytes())
    content[-(len(content) // 3) :] = content[-(len(content) // 3) :][::-1]
    (theirs / "model.safetensors").write_bytes(content)
    complete(corpus, run_dir, "stage.steps=1", f"init_from={ours}")
    assert "nothing to do" in complete(corpus, run_dir, "stage.steps=1", f"init_from={ours}")
    for made in ("finished", "other inputs (fingerprints)"):
        running = begin(corpus, run_dir, "stage.steps=1", f"init_from={theirs}")
        assert running.wait() == [OccupiedError.exit_code], running.output()
        assert made in running.output()
        (run_dir / "manifest.json").unlink(missing_ok=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_too_full_for_the_model_ends_all_ranks_with_a_message_and_the_restart_writes_it(corpus, tmp_path):
    """Room for the checkpoint (1.4 MB), not for the model (0.5 MB) beside it."""
    run_dir = tmp_path / "disk" / "run"
    run_dir.parent.mkdir()
    settings = ("stage.steps=2", "stage.checkpoint_every=0", "parallel.dp_shard=2", "parallel.zero=1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1900k", "tmpfs", run_dir.parent], check=True)
    try:
        running = begin(corpus, run_dir, *settings, logs=tmp_path, ranks=2)
        assert running.wait() == [1, 1]
        assert "the model was not written" in running.output() and "The checkpoint of step 2" in running.output()
        assert "Traceback" not in running.output(0) + running.output(1) and "error" not in running.output(1)
        subprocess.run(["mount", "-o", "remount,size=64m", run_dir.parent], check=True)
        complete(corpus, run_dir, *settings, logs=tmp_path, ranks=2)
        assert Artifact.read(run_dir).metrics["steps"] == 2
    finally:
        subprocess.run(["umount", run_dir.parent], check=True)
