"""A run on several corpora: its inputs are all of them, its order is a function, and it goes on at any size."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.artifact import Artifact
from data_pipeline.mixture import MixtureData, MixtureSource
from data_pipeline.tokenizer import Tokenizer
from tests.data import corpus_of, standard_library, tiny_tokenizer
from tests.train.runs import begin, complete, until
from train.metrics.jsonl import read
from train.stages.base import STOPPED_EARLY


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    directory, tokenizer = tmp_path_factory.mktemp("corpora"), tiny_tokenizer()
    texts = [text[:3000] for text in standard_library(60) if text]
    for name, part in (("web", texts[:40]), ("code", texts[40:])):
        corpus_of(part, tokenizer, directory / name)
    corpus_of(texts[:20], tiny_tokenizer(400), directory / "foreign")
    return directory


def settings(corpora, steps=12, code="code"):
    sources = (
        f"web: {{path: {corpora / 'web'}, weight: 0.75}}, code: {{path: {corpora / code}, weight: 0.25, tokens: 640}}"
    )
    return (
        "data=mixture",
        f"+data.sources={{{sources}}}",
        "data.warm_up_from=8",
        "data.warm_up_tokens=1000",
        f"stage.steps={steps}",
        "stage.checkpoint_every=4",
        "stage.validate_every=6",
    )


def losses(run_dir):
    return {line["step"]: line["loss"] for line in read(run_dir / "metrics.jsonl") if "loss" in line}


@pytest.fixture(scope="module")
def whole(corpora, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, complete(None, run_dir, *settings(corpora))


def test_the_manifest_names_every_corpus_and_what_it_gave(corpora, whole):
    run_dir, printed = whole
    run = Artifact.read(run_dir)
    assert {name: link["id"] for name, link in run.inputs.items()} == {
        f"data.{name}": Artifact.read(corpora / name).id for name in ("web", "code")
    }
    given = run.metrics["mixture"]
    assert given["web"]["samples"] + given["code"]["samples"] == run.metrics["samples"] == 96
    assert given["code"]["samples"] == 20, "its cap of 640 tokens"
    tokenizer = Tokenizer.load(corpora / "web" / "tokenizer")
    sources = {
        "web": MixtureSource(str(corpora / "web"), weight=0.75),
        "code": MixtureSource(str(corpora / "code"), weight=0.25, tokens=640),
    }
    samples = MixtureData(sources, sequence_length=32, warm_up_from=8, warm_up_tokens=1000).open("train", tokenizer, 0)
    assert run.facts["fingerprints"]["samples"] == samples.fingerprint
    assert given == samples.given(96)
    assert "read: web 2,432 tokens" in printed and "code 640 tokens" in printed
    splits = [Artifact.read(corpora / name).metrics["splits"]["validation"] for name in ("web", "code")]
    tokens, size = (sum(split[key] for split in splits) for key in ("tokens", "bytes"))
    bits_per_byte = run.metrics["validation_loss"] * tokens / size / torch.tensor(2.0).log().item()
    assert run.metrics["bits_per_byte"] == pytest.approx(bits_per_byte)


def test_a_stopped_run_goes_on_with_two_ranks_as_if_nothing_had_happened(corpora, whole, tmp_path):
    running = begin(None, tmp_path / "run", *settings(corpora))
    until(lambda: len(losses(tmp_path / "run")) >= 5, running)
    running.signal(signal.SIGTERM)
    assert running.wait() == [STOPPED_EARLY]
    printed = complete(None, tmp_path / "run", *settings(corpora), "parallel.dp_shard=2", "parallel.zero=2", ranks=2)
    assert "resumed from" in printed
    assert losses(tmp_path / "run") == pytest.approx(losses(whole[0]), abs=5e-6)
    found, expected = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", whole[0]))
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-4, atol=1e-5), name


def test_another_mixture_is_another_run_and_a_moved_corpus_is_not(corpora, whole, tmp_path):
    running = begin(None, whole[0], *settings(corpora), "data.sources.web.weight=0.5")
    assert running.wait() == [73]
    assert "data.sources.web.weight: 0.75 there, 0.5 now" in running.output()
    (tmp_path / "moved").symlink_to(corpora / "code")
    assert "nothing to do" in complete(
        None, whole[0], *settings(corpora), f"data.sources.code.path={tmp_path / 'moved'}"
    )


def test_corpora_of_different_tokenizers_are_refused(corpora, tmp_path):
    running = begin(None, tmp_path / "run", *settings(corpora, code="foreign"))
    assert running.wait() == [1]
    assert "data.sources=tokenizers web" in running.output()
    assert not (tmp_path / "run").exists()
