"""Text survives the tokenizer, and a tokenizer is known by its fingerprint."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.chat import CHATML
from data_pipeline.tokenizer import SPECIALS, TRAINERS, UNKNOWN, Tokenizer, TokenizerError, train_bpe
from data_pipeline.tokenizer_report import Sizes, report, table
from tests.data import standard_library, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TRAINED = {"bpe": TOKENIZER} | {
    name: TRAINERS[name](standard_library(20), 512, chat_template=CHATML) for name in ("unigram", "wordpiece")
}


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_decodes_to_itself(algorithm, text):
    tokenizer = TRAINED[algorithm]
    (ids,) = tokenizer.encode_documents([text])
    assert tokenizer.lossless
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.loss(text, ids) is None
    assert not tokenizer.special_ids.intersection(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_what_wordpiece_cannot_give_back_is_said(text):
    tokenizer = TRAINED["wordpiece"]
    (ids,) = tokenizer.encode_documents([text])
    restored, loss = tokenizer.decode(ids, skip_special=False), tokenizer.loss(text, ids)
    assert (loss == "unknown_tokens") == (tokenizer.unknown in ids)
    assert (loss is None) == (restored == text)
    assert loss != "not_restored"


@pytest.mark.parametrize(
    ("text", "loss"),
    [("one word", None), ("two  words\n", "normalised"), ("a\x00b", "normalised"), ("ends 字", "unknown_tokens")],
)
def test_wordpiece_loses_white_space_and_what_it_has_never_seen(text, loss):
    (ids,) = TRAINED["wordpiece"].encode_documents([text])
    assert TRAINED["wordpiece"].loss(text, ids) == loss


def test_a_tokenizer_that_drops_what_it_cannot_encode_is_found():
    """A BPE without an unknown token and without all bytes: the library leaves the rest out and says nothing."""
    from tokenizers import Tokenizer as Backend

    content = json.loads(TOKENIZER.backend.to_str())
    missing = content["model"]["vocab"].pop("Ġ")
    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if "Ġ" not in "".join(merge)]
    content["model"]["vocab"] = {t: n for t, n in content["model"]["vocab"].items() if "Ġ" not in t}
    assert missing
    tokenizer = Tokenizer(Backend.from_str(json.dumps(content)), TOKENIZER.config, None)
    (ids,) = tokenizer.encode_documents(["a é"])
    assert not tokenizer.lossless
    assert tokenizer.loss("a é", ids) == "normalised"  # white space only
    content["model"]["vocab"].pop("Ã")
    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if "Ã" not in "".join(merge)]
    tokenizer = Tokenizer(Backend.from_str(json.dumps(content)), TOKENIZER.config, None)
    (ids,) = tokenizer.encode_documents(["a é"])
    assert tokenizer.loss("a é", ids) == "not_restored"


@pytest.mark.parametrize("algorithm", TRAINERS)
def test_saved_tokenizers_load_in_transformers_with_the_same_ids(algorithm, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = TRAINED[algorithm]
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = standard_library(3)[2]
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert (theirs.eos_token, theirs.pad_token) == SPECIALS[:2]
    assert theirs.chat_template == CHATML
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.slow
def test_wordpiece_learns_the_same_vocabulary_in_every_process():
    code = "from tests.data import *; from data_pipeline.tokenizer import *; "
    code += "print(train_wordpiece(standard_library(20), 512).fingerprint)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert {run.stdout.strip() for run in runs} == {TRAINED["wordpiece"].fingerprint}


def test_the_report_counts_what_was_encoded():
    texts = ["def f(x): return x", "Zeichen für Zeichen"]
    encoded = TOKENIZER.encode_documents(texts)
    sizes = {("train", language, "prose", "here"): Sizes() for language in ("en", "de")}
    for its_sizes, text, ids in zip(sizes.values(), texts, encoded, strict=True):
        its_sizes.add(text, len(ids))
    counts_V = np.bincount(list(itertools.chain(*encoded)), minlength=512)
    found = report(TOKENIZER, sizes, counts_V)
    assert found["all"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["language"]["de"]["tokens_per_word"] == len(encoded[1]) / 3
    assert found["language"]["en"]["bytes_per_token"] == len(texts[0]) / len(encoded[0])
    assert found["unused"] == 512 - len(SPECIALS) - np.count_nonzero(counts_V)
    fragments = [n for n in itertools.chain(*encoded) if TOKENIZER.spelling(n) in (b"\xc3", b"\xbc")]
    assert len(fragments) == 2
    assert found["fragments"] == pytest.approx(2 / counts_V.sum())
    assert found["unknown"] == 0.0
    assert "language de" in table(found)


def test_the_spellings_of_a_text_are_its_bytes():
    text = "für 字 and\ttabs"
    for algorithm in ("bpe", "unigram"):
        (ids,) = TRAINED[algorithm].encode_documents([text])
        assert b"".join(map(TRAINED[algorithm].spelling, ids)) == text.encode()
    assert TRAINED["wordpiece"].spelling(TRAINED["wordpiece"].unknown) == UNKNOWN.encode()


def test_special_tokens_have_the_first_ids():
    assert [TOKENIZER.special(name) for name in SPECIALS] == list(range(8))
    assert (TOKENIZER.eos, TOKENIZER.pad, TOKENIZER.vocabulary) == (0, 1, 512)
    assert TOKENIZER.encode("a<|im_end|>") == [*TOKENIZER.encode("a"), 3]


def test_a_document_that_mentions_special_tokens_cannot_end_itself():
    (ids,) = TOKENIZER.encode_documents(["see <|endoftext|> and <|im_start|>"])
    assert not TOKENIZER.special_ids.intersection(ids)
    assert TOKENIZER.decode(ids) == "see <|endoftext|> and <|im_start|>"


def test_saving_and_loading_change_nothing(tmp_path):
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = standard_library(3)[2] + "<|im_start|>"
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.chat_template == CHATML


def test_every_other_tokenizer_has_another_fingerprint():
    assert len({t.fingerprint for t in (TOKENIZER, tiny_tokenizer(400), train_bpe(standard_library(5), 512))}) == 3
    assert tiny_tokenizer().fingerprint == TOKENIZER.fingerprint


def test_a_damaged_configuration_is_refused_by_name(tmp_path):
    tiny_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_bad_directories_and_vocabularies_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(TokenizerError, match="names no end-of-text token"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match=r"no token <\|nonsense\|>"):
        TOKENIZER.special("<|nonsense|>")
    with pytest.raises(TokenizerError, match="give 264 or more"):
        train_bpe(["a"], 100)
    with pytest.raises(TokenizerError, match="only enough repetition for"):
        train_bpe(["abc abc"], 1000)
