import time

import pytest
from datatrove.utils.text import split_into_sentences, split_into_words
from datatrove.utils.typeshelper import Languages
from hypothesis import example, given, settings

from data_pipeline.words import Splitter, english, split_sentences, split_words
from tests.data_pipeline.english import real_texts, texts

ENGLISH = Languages.english


def same(text: str) -> bool:
    return split_words(text) == split_into_words(text, ENGLISH) and (
        split_sentences(text) == split_into_sentences(text, ENGLISH)
    )


@settings(deadline=None, max_examples=300)
@given(texts())
@example("")
@example(" ")
@example("One. \n Two.  ")
@example('He said: "No. Never!" And left.\n\n"Why?" ... "So."')
@example("(see foo:) ) and (:ref:`x`) :( :")
@example("'' ''' he'll've 10km/h. 3.50€, 5µm; 20°C. U.S.A. foo..bar.... ...")
def test_words_and_sentences_are_those_of_datatrove(text):
    assert same(text)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(deadline=None, max_examples=5000)
@given(texts(60))
def test_words_and_sentences_are_those_of_datatrove_in_five_thousand_texts(text):
    assert same(text)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_words_and_sentences_of_real_text_are_those_of_datatrove(count):
    differing = [text[:80] for text in real_texts(count) if not same(text)]
    assert not differing


def test_a_longer_match_across_a_space_keeps_an_emoticon_apart():
    assert split_words("x:)") == ["x", ":)"]
    assert split_words("x:) )") == ["x", ":", ")", ")"] == split_into_words("x:) )", ENGLISH)
    assert split_words("x:)\n)") == ["x", ":)", ")"] == split_into_words("x:)\n)", ENGLISH)


def test_what_was_split_before_does_not_matter():
    splitter = Splitter(english().tokenizer, english().stops, remembered=50)
    for text in real_texts(20):
        assert splitter.words(text) == split_words(text)
        assert splitter.sentence_ends(text) == english().sentence_ends(text)
    splitter.words("")
    assert splitter.held == 0


def test_the_word_that_crashes_spacy_is_a_word():
    assert split_words("an IS_ALPHA here, IS_ALPHA:)") == ["an", "IS_ALPHA", "here", ",", "IS_ALPHA", ":)"]


@pytest.mark.parametrize("text", ["(" * 50_000, "a.b," * 20_000, "." * 50_000, "):" * 20_000, ": ) " * 5_000])
def test_time_grows_with_the_length_of_a_text(text):
    begin = time.process_time()
    split_words(text)
    assert time.process_time() - begin < 10
