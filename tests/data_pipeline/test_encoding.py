"""Words that are remembered give the ids that the library gives."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_pipeline import encoding
from data_pipeline.encoding import BEYOND_BMP, Encoder, translated
from data_pipeline.tokenizer import SPECIALS, TRAINERS, Tokenizer
from tests.data import standard_library, tiny_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEXTS = standard_library(12)


def with_splitter(splitter: pre_tokenizers.PreTokenizer | None, normaliser=None, added=()) -> Tokenizer:
    """Our tiny vocabulary behind another split."""
    backend = Backend.from_str(tiny_tokenizer().backend.to_str())
    if splitter is not None:
        backend.pre_tokenizer = splitter
    if normaliser is not None:
        backend.normalizer = normaliser
    backend.add_tokens(list(added))
    return Tokenizer(backend, tiny_tokenizer().config, None)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    by_pattern = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


ENCODERS = {
    "ours": Encoder(tiny_tokenizer()),
    "unigram": Encoder(TRAINERS["unigram"](TEXTS, 512)),
    "gpt2": Encoder(with_splitter(pre_tokenizers.ByteLevel(add_prefix_space=False))),
    "llama3": Encoder(with_splitter(split_by(LLAMA3))),
    "qwen2": Encoder(with_splitter(split_by(QWEN2), normalizers.NFC())),
    "whitespace added by name": Encoder(with_splitter(None, added=[AddedToken("    ", normalized=False)])),
}
WRITTEN = (
    st.text()
    | st.text(alphabet=st.sampled_from("aZſK's'RE 1²४\t\n\r\u00a0\u3000\x1c\x85_-é\u0301字😀𐐷𝟙\u0378"))
    | st.lists(st.sampled_from([*SPECIALS, " ", "don't", "x1", "    ", "\n\n", "'LL", "ǆ"])).map("".join)
)


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(WRITTEN, max_size=4))
def test_any_text_has_the_ids_that_the_library_gives(name, texts):
    encoder = ENCODERS[name]
    assert encoder.words is not None
    found = encoder.encode(texts)
    assert [ids_T.tolist() for ids_T in found] == encoder.tokenizer.encode_documents(texts)
    assert not encoder.tokenizer.special_ids.intersection(*found) if found else True


def by_library(encoder: Encoder, text: str) -> list[str]:
    return [text[a:b] for _, (a, b) in encoder.tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=150, deadline=None)
@given(text=WRITTEN)
def test_any_text_is_split_as_the_library_splits_it(name, text):
    """A tiny vocabulary has the same ids for words that are split in another place."""
    encoder = ENCODERS[name]
    if BEYOND_BMP.search(text):
        assert encoder._by_words(text) is None
    else:
        assert encoder.words.findall(text) == by_library(encoder, text)


@pytest.mark.parametrize("name", ENCODERS)
def test_source_files_have_the_ids_that_the_library_gives(name):
    encoder = ENCODERS[name]
    assert [ids_T.tolist() for ids_T in encoder.encode(TEXTS)] == encoder.tokenizer.encode_documents(TEXTS)


def test_every_character_is_split_as_the_library_splits_it():
    every = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(f"a{character}1 {character}\n" for character in every[i : i + 256]) for i in range(0, 63488, 256)]
    for name in ("ours", "llama3"):
        encoder = ENCODERS[name]
        assert [encoder.words.findall(text) for text in texts] == [by_library(encoder, text) for text in texts]


@pytest.mark.parametrize(
    "tokenizer",
    [
        TRAINERS["wordpiece"](TEXTS, 512),
        with_splitter(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        with_splitter(split_by(r"\p{Lu}+|[\s\S]")),
        with_splitter(pre_tokenizers.Metaspace()),
        with_splitter(None, normalizers.Lowercase()),
    ],
    ids=["wordpiece", "prefix space", "other classes", "metaspace", "lowercase"],
)
def test_what_no_pattern_expresses_goes_through_the_library(tokenizer):
    encoder = Encoder(tokenizer)
    assert encoder.words is None
    assert [ids_T.tolist() for ids_T in encoder.encode(TEXTS)] == tokenizer.encode_documents(TEXTS)


def test_a_pattern_that_leaves_text_out_is_left_to_the_library():
    tokenizer = with_splitter(split_by(r"\p{L}+"))
    encoder = Encoder(tokenizer)
    assert encoder.words is not None
    assert [ids_T.tolist() for ids_T in encoder.encode(["a b", "ab"])] == tokenizer.encode_documents(["a b", "ab"])


def test_a_wrong_split_is_found_in_a_document_that_is_encoded_both_ways():
    encoder = Encoder(tiny_tokenizer())
    encoder.words = translated(r"\p{L}|[^\p{L}]+")
    with pytest.raises(RuntimeError, match="words and library give other ids"):
        encoder.encode(["def function(self):"])


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(encoding, "WORDS", 10)
    encoder = Encoder(tiny_tokenizer())
    assert [ids_T.tolist() for ids_T in encoder.encode(TEXTS)] == encoder.tokenizer.encode_documents(TEXTS)
    assert len(encoder.known) == 10
    assert all(len(word) <= encoding.LONGEST_WORD for word in encoder.known)


def test_ids_beyond_16_bits_are_kept():
    content = json.loads(tiny_tokenizer().backend.to_str())
    content["model"]["vocab"] = {token: n + 70_000 * (n > 300) for token, n in content["model"]["vocab"].items()}
    tokenizer = Tokenizer(Backend.from_str(json.dumps(content)), tiny_tokenizer().config, None)
    encoder = Encoder(tokenizer)
    assert encoder.dtype == np.int32
    assert [ids_T.tolist() for ids_T in encoder.encode(TEXTS)] == tokenizer.encode_documents(TEXTS)
