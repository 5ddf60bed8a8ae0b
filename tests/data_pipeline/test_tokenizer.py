"""Text survives the tokenizer, and a tokenizer is known by its fingerprint."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.chat import CHATML
from data_pipeline.tokenizer import SPECIALS, Tokenizer, TokenizerError, train_bpe
from tests.data import standard_library, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_decodes_to_itself(text):
    (ids,) = TOKENIZER.encode_documents([text])
    assert TOKENIZER.decode(ids, skip_special=False) == text
    assert not TOKENIZER.special_ids.intersection(ids)


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
