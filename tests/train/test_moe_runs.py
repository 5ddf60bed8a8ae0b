"""Whole stages with experts: trained on two ranks, resumed on one, exported, verified."""

import signal
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from conf.errors import ConfigError
from data_pipeline.artifact import Artifact
from tests.train.exports import TINY, evaluation, stage, trained_run
from tests.train.runs import begin, complete, until
from train.metrics.jsonl import read
from train.models.moe import MoE
from train.stages.base import STOPPED_EARLY

SETTINGS = (
    "stage.steps=12",
    "stage.checkpoint_every=4",
    "model=smoke_moe",
    "model.moe.scoring=sigmoid",
    "model.moe.selection_bias=true",
    "model.moe.shared=48",
)
SHARED = ("parallel.dp_shard=2", "parallel.ep=2", "parallel.zero=2")
PLAIN = MoE(experts=4, active=2, intermediate=32)


def test_a_run_on_two_ranks_that_share_experts_goes_on_alone(corpus, tmp_path):
    complete(corpus, tmp_path / "alone", *SETTINGS)
    running = begin(corpus, tmp_path / "run", *SETTINGS, *SHARED, ranks=2)
    until(lambda: sum("loss" in line for line in read(tmp_path / "run" / "metrics.jsonl")) >= 5, running)
    running.signal(signal.SIGTERM)
    assert running.wait() == [STOPPED_EARLY] * 2, running.output()
    assert "resumed from" in complete(corpus, tmp_path / "run", *SETTINGS)

    found, expected = (
        [line for line in read(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("run", "alone")
    )
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for key in ("loss", "expert_load_max", "balance_loss"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], abs=1e-5)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "alone"))
    biases = [name for name in one if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all((one[name] != 0).any() for name in biases)
    assert all((one[name] - other[name]).norm() <= 1e-5 * other[name].norm() for name in other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, intermediate=32, moe=PLAIN),
        replace(TINY, qkv_bias=True, moe=replace(PLAIN, shared=48, shared_gate=True)),
        replace(TINY, qk_norm=True, moe=replace(PLAIN, first=1)),
        replace(TINY, qk_norm=True, moe=replace(PLAIN, shared=32, scoring="sigmoid", selection_bias=True)),
    ],
    ids=["mixtral", "qwen2_moe", "qwen3_moe", "dots1"],
)
def test_an_export_with_experts_is_verified_by_transformers(tmp_path, config):
    evaluation(tmp_path / "evaluate", trained_run(tmp_path / "sft", config=config))
    given = {"init_from": tmp_path / "sft", "run_dir": tmp_path / "export", "export.evaluation": tmp_path / "evaluate"}
    assert stage(stage="export", **given) == 0
    assert stage(stage="verify", init_from=tmp_path / "export", run_dir=tmp_path / "verify") == 0
    assert Artifact.read(tmp_path / "verify", kind="verification")


def test_experts_that_could_not_be_written_are_refused_before_the_run(tmp_path):
    settings = {"model": "smoke_moe", "model.moe.selection_bias": True, "data.path": tmp_path, "dry_run": True}
    with pytest.raises(ConfigError, match=r"model=decoder: cannot be written at the end of the run.*selection_bias"):
        stage(stage="pretrain", **settings)
