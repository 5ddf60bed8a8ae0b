"""Any tokenizer against a corpus: the one that made it finds the corpus's own figures."""

import pytest

from data_pipeline.corpus.build import build
from data_pipeline.corpus.text import TextCorpus
from data_pipeline.sources.files import Files
from data_pipeline.tokenizer import TRAINERS
from tests.data import standard_library
from tools.tokenizer import TokenizerConfig, main, measure

TEXTS = [text for text in standard_library(30) if text]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (root / f"{number:02}.py").write_text(text)
    settings = TextCorpus({"files": Files([str(root)])}, vocabulary=400, pieces=2, validation=0.2, test=0.2)
    return build(settings, root / "corpus", root / "cache", workers=1)


def test_the_tokenizer_of_a_corpus_finds_the_figures_of_its_manifest(corpus):
    found = measure(TokenizerConfig(str(corpus.path), str(corpus.path / "tokenizer"), split="train"))
    assert found["all"] == corpus.metrics["tokenizer"]["split"]["train"]
    assert set(found["source"]) == set(corpus.metrics["tokenizer"]["source"])
    assert found["round_trip"] == {}


def test_another_tokenizer_is_measured_on_the_same_text_and_its_losses_are_counted(corpus, tmp_path, capsys):
    TRAINERS["wordpiece"](TEXTS[:1], 300).save(tmp_path)
    config = TokenizerConfig(str(corpus.path), str(tmp_path), split="train", documents=5)
    found = measure(config)
    assert found["all"]["documents"] == 5
    assert found["round_trip"].get("unknown_tokens", 0) + found["round_trip"].get("normalised", 0) == 5
    assert main(config, {}) == 0
    assert "came back exactly 0" in capsys.readouterr().out
