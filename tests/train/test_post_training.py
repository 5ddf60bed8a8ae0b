"""SFT and DPO by the real trainer on tiny models and real tasks."""

import json
from pathlib import Path

import pytest

from data_pipeline.artifact import Artifact, Draft
from data_pipeline.corpus.tasks import Tasks
from data_pipeline.templates import template
from data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.chats import write_jsonl
from tests.ranks import run_ranks
from tests.train.exports import stage, trained_run


def train(settings: dict[str, str]) -> int:
    return stage(**settings)


@pytest.fixture(scope="module")
def life(tmp_path_factory, corpus: Path) -> Path:
    root = tmp_path_factory.mktemp("life")
    tasks = Tasks(tasks=["parity"], train=400, validation=20, test=3, pairs=64, small_talk=0)
    for stem, records in tasks.made(0).items():
        write_jsonl(root / "tasks" / f"{stem}.jsonl", records)
    Draft(root / "tasks", "chat", {}, {}).publish("*.jsonl")
    trained_run(root / "base", tokenizer=Tokenizer.load(corpus / "tokenizer"), kind="pretrain")
    return root


def settings(life: Path, kind: str, start: str, run_dir: Path, **others: str) -> dict[str, str]:
    return {
        "stage": kind,
        "init_from": str(life / start),
        "data.path": str(life / "tasks"),
        "data.sequence_length": "128",
        "run_dir": str(run_dir),
        "stage.precision": "fp32",
        "stage.deterministic": "true",
        "logger": "[jsonl]",
        **others,
    }


SFT = {"stage.steps": "24", "stage.global_batch": "8", "optim.lr": "3e-3", "stage.validate_every": "12"}
DPO = {"stage.steps": "6", "stage.global_batch": "8", "optim.lr": "1e-3", "stage.validate_every": "3"}
LAYOUTS = {"one": {}, "two": {"parallel.dp_shard": "2", "parallel.zero": "3"}}


def metrics(run_dir: Path, name: str) -> list[float]:
    """The values of a metric over the run."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_sft_learns_to_answer(life, tmp_path):
    run_ranks(1, train, settings(life, "sft", "base", tmp_path / "sft", **SFT))
    losses = metrics(tmp_path / "sft", "validation_loss")
    assert losses[-1] < 1.2 < 3.0 < losses[0]


def test_the_template_that_the_data_name_is_the_models_from_then_on(life, tmp_path):
    short = {"stage.steps": "2", "stage.global_batch": "8", "data.chat_template": "plain"}
    run_ranks(1, train, settings(life, "sft", "base", tmp_path / "sft", **short))
    assert Tokenizer.load(tmp_path / "sft" / "model").chat_template == template("plain")
    assert Tokenizer.load(life / "base" / "model").chat_template != template("plain")


@pytest.fixture(scope="module")
def preferred(life) -> Path:
    """The same DPO run on one rank, and on two that share all of the state."""
    for ranks, (name, layout) in enumerate(LAYOUTS.items(), 1):
        run_ranks(ranks, train, settings(life, "dpo", "base", life / name, **DPO, **layout))
    return life


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_starts_at_no_margin_and_raises_it(preferred, layout):
    run = preferred / layout
    assert metrics(run, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    assert abs(metrics(run, "margin")[0]) < 1e-3
    assert metrics(run, "validation_margin")[-1] > 0.01
    assert Artifact.read(run, kind="dpo").metrics["validation_loss"] < 0.69


def test_dpo_runs_alike_on_one_rank_and_two(preferred):
    one, two = (metrics(preferred / name, "loss") for name in LAYOUTS)
    assert one == pytest.approx(two, abs=5e-6)
