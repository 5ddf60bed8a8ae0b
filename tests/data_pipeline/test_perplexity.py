"""Perplexity: the n-gram model against its definition, a language model against transformers, bands of both."""

import math
import random
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from data_pipeline.artifact import Artifact
from data_pipeline.config import PipelineConfig
from data_pipeline.corpus.ngram import NGramModel, ReferenceTextError
from data_pipeline.ngram import NGram, train
from data_pipeline.page import Page
from data_pipeline.steps.perplexity import Perplexity
from tests.data import tiny_tokenizer

PROSE = [text for text in topics.values() if len(text) > 500]


def by_hand(texts: list[str], order: int, text: str) -> float:
    """Witten-Bell by its definition, one byte at a time."""
    follows: dict[bytes, Counter[int]] = {}
    before = bytes(order - 1)
    for one in texts:
        data = before + one.encode()
        for end in range(order - 1, len(data)):
            for n in range(1, order + 1):
                follows.setdefault(bytes([n]) + data[end - n + 1 : end], Counter())[data[end]] += 1
    data, bits = before + text.encode(), 0.0
    for end in range(order - 1, len(data)):
        p = 1 / 256
        for n in range(1, order + 1):
            if seen := follows.get(bytes([n]) + data[end - n + 1 : end]):
                p = (seen[data[end]] + len(seen) * p) / (sum(seen.values()) + len(seen))
        bits -= math.log2(p)
    return bits / len(text.encode())


@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_bits_are_those_of_the_definition(order):
    model = train(PROSE[:3], order)
    for text in (PROSE[0][:200], PROSE[5][:200], "zzqq", "é", "a"):
        assert model.bits_per_byte(text) == pytest.approx(by_hand(PROSE[:3], order, text))


def test_probabilities_of_the_next_byte_sum_to_one():
    model = train(["abracadabra", "abc"], 3)
    # bits of "ab?" less those of "ab" are the information of the last byte
    known = 2 * model.bits_per_byte("ab")
    p = [2 ** -(3 * model.bits_per_byte(f"ab{chr(code)}") - known) for code in range(1, 128)]
    never = (1 - sum(p)) / 129  # the other bytes, all alike
    assert never > 0
    assert p[ord("r") - 1] > p[ord("c") - 1] > p[ord("z") - 1] == pytest.approx(never, rel=1e-6)


def test_a_model_is_the_same_after_saving(tmp_path):
    model = train(PROSE[:5], 5)
    model.save(tmp_path / "ngram.npz")
    assert NGram.load(tmp_path / "ngram.npz").bits_per_byte(PROSE[9]) == model.bits_per_byte(PROSE[9])


@pytest.fixture(scope="module")
def ngram(tmp_path_factory):
    root = tmp_path_factory.mktemp("ngram")
    (root / "reference").mkdir()
    for number, text in enumerate(PROSE[10:]):
        (root / "reference" / f"{number}.txt").write_text(text)
    config = PipelineConfig(corpus=NGramModel([str(root / "reference")], order=5), run_dir=str(root / "model"))
    assert config.problems() == []
    assert config.corpus.run(config, {}) == 0
    return root / "model"


def test_prose_is_in_the_band_gibberish_above_and_repetition_below(ngram):
    step = Perplexity(model=str(ngram), least=0.7, most=3.5)
    assert step.problems("k") == []
    rng = random.Random(0)
    for text in PROSE[:10]:
        page = Page(text, "id", {})
        assert step.judge(page) is None
        assert 0.7 < page.metadata["bits_per_byte"] < 3.5
        assert sum(page.counts.values()) == 1
    assert step.judge(Page("".join(rng.choices("abcdefghijklmnop qrstuvwxyz", k=2000)), "id", {})) == "too_unlikely"
    assert step.judge(Page(" " * 500 + "=" * 200, "id", {})) == "too_likely"


def test_a_model_that_is_made_is_not_made_again_until_the_text_changes(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(PROSE[0])
    config = PipelineConfig(corpus=NGramModel([str(tmp_path / "text.txt")], order=3), run_dir=str(tmp_path / "model"))
    assert config.corpus.run(config, {}) == 0
    made = Artifact.read(tmp_path / "model", "ngram")
    assert config.corpus.run(config, {}) == 0
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text(PROSE[1])
    assert config.corpus.run(config, {}) == 0
    assert Artifact.read(tmp_path / "model").id != made.id


def test_reference_text_that_is_none_is_refused(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("")
    for name, message in (("bad.txt", "bad.txt is not UTF-8"), ("empty.txt", "no text")):
        config = PipelineConfig(corpus=NGramModel([str(tmp_path / name)]), run_dir=str(tmp_path / name[:-4]))
        with pytest.raises(ReferenceTextError, match=message):
            config.corpus.run(config, {})
    bad = PipelineConfig(corpus=NGramModel(["/nowhere"], order=9, most_bytes=0))
    assert [problem.key for problem in bad.problems()] == ["corpus.paths", "corpus.order", "corpus.most_bytes"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny Llama with its tokenizer, as Hugging Face saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save(directory)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=128, **shape)).save_pretrained(directory)
    return directory


def test_a_language_models_bits_are_transformers_own_loss(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    step = Perplexity(model=str(exported))
    assert step.problems("k") == []
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in ("A short text.", "Ünïcödé 天气"):
        ids = torch.tensor([[begin, *tokenizer.encode(text, add_special_tokens=False)]])
        loss = model(ids, labels=ids).loss.item()
        assert step.bits_per_byte(text) == pytest.approx(
            loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode()), rel=1e-5
        )


def test_only_the_tokens_that_fit_are_read(exported):
    step = Perplexity(model=str(exported))
    begin = "the value of the name is " * 40
    assert step.bits_per_byte(begin + PROSE[0]) == step.bits_per_byte(begin + PROSE[1])
    assert np.isfinite(step.bits_per_byte(PROSE[0]))
    short = Perplexity(model=str(exported), most_tokens=4)
    assert short.bits_per_byte("the value" + "x" * 300) != step.bits_per_byte("the value" + "x" * 300)


def test_bands_and_models_that_cannot_be_are_named(tmp_path, ngram):
    (tmp_path / "config.json").write_text("{}")  # a model without tokenizer and weights
    found = Perplexity(model=str(tmp_path), least=2.0, most=1.0, most_tokens=0).problems("k")
    assert [problem.key for problem in found] == ["k.model", "k.most", "k.most_tokens"]
    assert Perplexity(model=str(ngram)).state() != Perplexity(model=str(ngram.parent / "reference")).state()
