"""Gopher, C4 and FineWeb decide as datatrove's blocks do, in reasons and texts too."""

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_top_duplicate, get_n_grams
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.page import Page
from data_pipeline.steps import gopher_repetition
from data_pipeline.steps.base import DocumentStep
from data_pipeline.steps.c4 import C4
from data_pipeline.steps.c4_paragraphs import C4Paragraphs
from data_pipeline.steps.fineweb import FineWeb
from data_pipeline.steps.gopher_quality import GopherQuality
from data_pipeline.steps.gopher_repetition import GopherRepetition, Words, occurred_before
from tests.data_pipeline.english import HARD, real_texts, texts

LINES = """
The cat and the dog have been to the house of the king, and that was that.
She said: "It is what it is." Then they went away with the others...
- an item of a list
• another item
Read our privacy policy and the terms of use, please do.
Please enable JavaScript to see this page.
Wikipedia says so.[1] It is edited[edit] by many [23].
Lorem ipsum dolor sit amet.
function() { return 1; }.
Short
# # # ## heading
Continue reading…
12 34 56 7890 -- !! ??
one two three one two three one two three one two three one two three.
A long line of prose that says much of little, and little of much, so that it is a paragraph by itself and no less; it \
goes on, and on, and further on, until it has come to the two hundred characters that are asked of a paragraph.
""".strip().split("\n")
STEPS: dict[str, tuple[BaseFilter, DocumentStep]] = {
    "gopher_quality": (GopherQualityFilter(), GopherQuality()),
    "gopher_quality_of_short_texts": (
        GopherQualityFilter(3, 60, 3, 4.5, 0.02, 0.3, 0.2, 0.7, 2, ["the", "cat", "of"]),
        GopherQuality(
            least_words=3,
            most_words=60,
            shortest_words=3,
            longest_words=4.5,
            symbols=0.02,
            bullets=0.3,
            ellipses=0.2,
            alphabetic_words=0.7,
            least_stop_words=2,
            stop_words=["the", "cat", "of"],
        ),
    ),
    "gopher_repetition": (GopherRepetitionFilter(), GopherRepetition()),
    "gopher_repetition_of_words": (
        GopherRepetitionFilter(0, 0, 0, 0, top_n_grams=((3, 0.1),), dup_n_grams=((2, 0.3), (5, 0.2))),
        GopherRepetition(
            paragraphs=0,
            paragraph_characters=0,
            lines=0,
            line_characters=0,
            top_n_grams={3: 0.1},
            duplicate_n_grams={2: 0.3, 5: 0.2},
        ),
    ),
    "c4": (C4QualityFilter(), C4()),
    "c4_by_sentence": (
        C4QualityFilter(
            split_paragraph=False, min_num_sentences=3, filter_lorem_ipsum=False, filter_curly_bracket=False
        ),
        C4(by_sentence=True, least_sentences=3, lorem_ipsum=False, curly_bracket=False),
    ),
    "c4_of_short_words": (
        C4QualityFilter(
            remove_citations=False, filter_no_terminal_punct=False, min_num_sentences=-1, max_word_length=10
        ),
        C4(citations=False, terminal_punctuation=False, least_sentences=0, longest_word=10),
    ),
    "c4_paragraphs": (C4ParagraphFilter(), C4Paragraphs()),
    "fineweb": (FineWebQualityFilter(), FineWeb()),
    "fineweb_of_lists": (
        FineWebQualityFilter(
            None, line_punct_exclude_zero=True, short_line_thr=0.4, short_line_length=20, char_duplicates_ratio=0.5
        ),
        FineWeb(unpunctuated=True, short_lines=0.4, short_line=20, repeated_characters=0.5),
    ),
}
REASONS = {"< 3 paragraphs": "few_paragraphs"}
"""Of datatrove, where ours has another form."""

line = st.one_of(st.sampled_from(LINES), st.lists(st.sampled_from(HARD.split()), max_size=12).map(" ".join))
pages = st.one_of(
    texts(60),
    st.lists(st.tuples(line, st.sampled_from(["\n", "\n\n", " ", "\r\n", "\n \n"])).map("".join), max_size=40).map(
        "".join
    ),
)


def theirs(block: BaseFilter, text: str) -> tuple[str | None, str]:
    document = Document(text, "1")
    kept, reason = get_filter_result(block.filter(document))
    return (None, document.text) if kept else (REASONS.get(reason, reason), text)


def ours(step: DocumentStep, text: str) -> tuple[str | None, str]:
    page = Page(text, "1", {"kind": "prose"})
    reason = step.judge(page)
    return (None, page.text) if reason is None else (reason, text)


@pytest.mark.parametrize("name", STEPS)
@settings(deadline=None, max_examples=60)
@given(text=pages)
def test_a_step_decides_as_the_block(name, text):
    block, step = STEPS[name]
    assert ours(step, text) == theirs(block, text)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(deadline=None, max_examples=3000)
@given(text=pages)
def test_steps_decide_as_the_blocks_on_thousands_of_pages(text):
    for block, step in STEPS.values():
        assert ours(step, text) == theirs(block, text)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_steps_decide_as_the_blocks_on_real_text(count):
    found = real_texts(count)
    whole = ["\n\n".join(found[at : at + 6]) for at in range(0, len(found), 6)]
    for name, (block, step) in STEPS.items():
        for text in [*found, *whole]:
            assert ours(step, text) == theirs(block, text), name


def test_every_reason_is_given_to_some_page():
    generator = np.random.default_rng(0)
    drawn = ["\n".join(generator.choice(LINES, generator.integers(1, 30))) for _ in range(150)]
    drawn += ["\n".join([text] * 2) for text in LINES] + ["\n\n".join([LINES[0], LINES[1]] * 3)] + [" ", "x " * 20, ""]
    drawn += [" ".join(generator.permutation(" ".join(LINES[:2] * 2).split())) for _ in range(10)]
    drawn += ["supercalifragilistic " * 60, "a be of to in that the " * 12, "the and " + "\n".join(["- x y z"] * 40)]
    least = {"gopher_quality": 7, "gopher_repetition": 8, "c4": 4, "c4_paragraphs": 2, "fineweb": 5}
    for name, expected in least.items():
        block, step = STEPS[name]
        answers = [(ours(step, text), theirs(block, text)) for text in drawn if text or name != "gopher_quality"]
        assert all(mine == other for mine, other in answers)
        reasons = {mine[0] for mine, _ in answers}
        assert len(reasons) >= expected, (name, reasons)


words = st.lists(st.sampled_from(["a", "b", "ab", "ba", "aab", "c", "é", "\U0001f600"]), min_size=1, max_size=60)


@settings(deadline=None, max_examples=300)
@given(words, st.integers(1, 10))
def test_n_grams_are_counted_as_datatrove_counts_them(words, n):
    counted = Words(words)
    if len(words) >= n:
        assert counted.top(n) == find_top_duplicate(get_n_grams(words, n))
    repeated, size = find_all_duplicate(words, n), len(" ".join(words))
    assert not counted.repeat_more(n, repeated / size, size)
    assert not repeated or counted.repeat_more(n, (repeated - 0.5) / size, size)


def test_more_different_words_than_numbers_can_tell_apart_are_counted_one_by_one(monkeypatch):
    text = [*"abcabcabd", *map(str, range(30))]
    expected = [Words(text).top(n) for n in (2, 3, 4)]
    monkeypatch.setattr(gopher_repetition, "LARGEST_CODE", 1000)
    assert [Words(text).top(n) for n in (2, 3, 4)] == expected


def test_equal_hashes_of_different_words_change_no_decision(monkeypatch):
    monkeypatch.setattr(gopher_repetition, "BASE", np.uint64(1))  # anagrams collide
    words = ["stop", "spot", "tops", "post", "pots", "opts"] * 3
    for n in (1, 2, 3):
        repeated, size = find_all_duplicate(words, n), 100
        assert Words(words).repeat_more(n, (repeated - 0.5) / size, size)
        assert not Words(words).repeat_more(n, repeated / size, size)


def test_what_occurred_before_is_counted_from_the_second_time_on():
    assert occurred_before(["ab", "c", "ab", "ab"]) == (2, 4)


@pytest.mark.parametrize(
    ("cited", "kept"),
    [
        ("This was said.[1] And that[edit] too.[citation needed]", "This was said. And that too."),
        ("There is lorem[1] ipsum in this.", None),
        ("There is java[2]script in this.", ""),
        ("There is use [3]of[4] cookies in this.", ""),
    ],
)
def test_c4_finds_what_citations_hide(cited, kept):
    prose = "\n".join([LINES[0]] * 5)
    found = ours(C4(), f"{prose}\n{cited}")
    assert found == theirs(C4QualityFilter(), f"{prose}\n{cited}")
    assert found == ("lorem_ipsum", f"{prose}\n{cited}") if kept is None else (None, f"{prose}\n{kept}".strip())


def test_c4_counts_the_lines_it_removes():
    page = Page("\n".join([LINES[0]] * 5 + [LINES[4], LINES[5], LINES[9], "No."]), "1", {"kind": "prose"})
    assert C4().judge(page) is None
    assert page.text == "\n".join([LINES[0]] * 5)
    assert page.counts == {
        "lines_policy": 1,
        "lines_javascript": 1,
        "lines_no_terminal_punctuation": 1,
        "lines_too_few_words": 1,
    }


def test_a_page_without_words_is_short_whatever_the_settings():
    assert GopherQuality(least_words=0).judge(Page(" \n", "1", {"kind": "prose"})) == "gopher_short_doc"


@pytest.mark.parametrize(
    ("step", "keys"),
    [
        (GopherQuality(least_words=-1, bullets=2, least_stop_words=9), ["least_words", "bullets", "least_stop_words"]),
        (GopherRepetition(lines=1.5, top_n_grams={0: 0.2}), ["lines", "top_n_grams.0"]),
        (C4(least_words=-1), ["least_words"]),
        (C4Paragraphs(least=0), ["least"]),
        (FineWeb(short_lines=2, line_feeds=-1), ["short_lines", "line_feeds"]),
    ],
)
def test_settings_without_sense_are_refused(step, keys):
    assert [problem.key for problem in step.problems("s")] == [f"s.{key}" for key in keys]
