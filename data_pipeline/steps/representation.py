"""Who and what a corpus speaks of, and where it comes from: an audit in counts, which can stop the build.

Terms are counted, not meanings: `she` counts for women whatever is said of her. Shares of terms say whether a corpus
mentions a group, not whether it does so fairly (Gebru et al. 2021, arXiv:1803.09010, ask for both).
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from conf.errors import Problem
from conf.registry import register
from data_pipeline.page import Page
from data_pipeline.phrases import Phrases
from data_pipeline.steps.base import DocumentStep

UNKNOWN = "unknown"
CHARACTERS, TERMS, DOCUMENTS = "characters", "terms", "documents"


AXES = {
    "gender": {
        "female": "she, her, hers, herself, woman, women, girl, girls, mother, daughter, sister, wife, lady, queen",
        "male": "he, him, his, himself, man, men, boy, boys, father, son, brother, husband, gentleman, king",
    },
    "religion": {
        "christian": "christian, christians, christianity, church, bible, jesus, catholic, protestant",
        "muslim": "muslim, muslims, islam, islamic, mosque, quran, koran, muhammad",
        "jewish": "jewish, jew, jews, judaism, synagogue, torah, rabbi",
        "hindu": "hindu, hindus, hinduism, vedas, bhagavad gita",
        "buddhist": "buddhist, buddhists, buddhism, buddha",
        "none": "atheist, atheists, atheism, agnostic, agnostics",
    },
    "region": {
        "africa": "africa, african, africans, nigeria, kenya, ethiopia, ghana, egypt",
        "asia": "asia, asian, asians, china, chinese, india, indian, japan, japanese, indonesia",
        "europe": "europe, european, europeans, germany, german, france, french, britain, british, italy",
        "latin_america": "mexico, mexican, brazil, brazilian, argentina, colombia, peru, latin america",
        "middle_east": "iran, iraq, turkey, arab, arabs, arabia, israel, middle east",
        "north_america": "america, american, americans, usa, canada, canadian, united states",
        "oceania": "australia, australian, zealand, maori, oceania",
    },
    "orientation": {
        "heterosexual": "heterosexual, heterosexuals, straight people",
        "homosexual": "gay, gays, lesbian, lesbians, homosexual, homosexuals",
        "bisexual": "bisexual, bisexuals, bisexuality",
        "transgender": "transgender, transsexual, nonbinary, trans woman, trans man",
    },
    "age": {
        "young": "child, children, kid, kids, teenager, teenagers, youth, young",
        "old": "elderly, elder, elders, senior, seniors, pensioner, pensioners, retired, grandmother, grandfather",
    },
    "dialect": {
        "american": "color, colors, center, favorite, realize, organize, gotten, apartment, sidewalk, math",
        "british": "colour, colours, centre, favourite, realise, organise, whilst, pavement, maths",
        "indian": "lakh, lakhs, crore, crores, prepone, timepass",
        "african_american": "finna, tryna, ain't, he be, she be, they be",
        "singlish": "lah, leh, kiasu, shiok",
    },
}
"""Axis -> group -> its terms. English; a configuration may change them, and add its own."""


def axes() -> dict[str, dict[str, list[str]]]:
    return {axis: {group: terms.split(", ") for group, terms in groups.items()} for axis, groups in AXES.items()}


@register("corpus/step", "representation")
@dataclass(frozen=True)
class Representation(DocumentStep):
    """Count characters by metadata, and documents and terms by group; drop nothing. Limits, where given, stop the
    build.

    Counts are `characters/<key>/<value>`, `terms/<axis>/<group>` and `documents/<axis>/<group>`. Run it twice, under
    two names, to see what the steps between did to each group.

    Args:
        keys: metadata whose values the characters are counted by; `language` is written by the step of that name.
        axes: axis -> group -> terms.
        most: metadata key -> most share of all characters that one value may have, in (0, 1].
        least: metadata key -> value -> least share of all characters that it must have, in [0, 1].
        ratios: axis -> most times that the group with most terms may outnumber the one with least; 1 or more.
    """

    topic: ClassVar[str] = "representation"

    keys: list[str] = field(default_factory=lambda: ["source", "licence", "language", "kind"])
    axes: dict[str, dict[str, list[str]]] = field(default_factory=axes)
    most: dict[str, float] = field(default_factory=dict)
    least: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        for name in {*self.most, *self.least} - {*self.keys}:
            found.append(Problem(f"{key}.keys", self.keys, f"with {name}, which a limit is set for"))
        for name, share in self.most.items():
            if not 0 < share <= 1:
                found.append(Problem(f"{key}.most.{name}", share, "a share in (0, 1]"))
        for name, shares in self.least.items():
            for value, share in shares.items():
                if not 0 <= share <= 1:
                    found.append(Problem(f"{key}.least.{name}.{value}", share, "a share in [0, 1]"))
        for axis, ratio in self.ratios.items():
            if axis not in self.axes:
                found.append(Problem(f"{key}.ratios", axis, f"an axis of {', '.join(self.axes)}"))
            elif ratio < 1:
                found.append(Problem(f"{key}.ratios.{axis}", ratio, "1 or more"))
        return found

    def judge(self, page: Page) -> None:
        for key in self.keys:
            page.counts[f"{CHARACTERS}/{key}/{page.metadata.get(key) or UNKNOWN}"] += len(page.text)
        terms = Counter(group for group, _ in self.phrases.places(page.words))
        for group, count in terms.items():
            page.counts[f"{TERMS}/{group}"] += count
            page.counts[f"{DOCUMENTS}/{group}"] += 1

    def conclude(self, totals: Counter[str]) -> list[str]:
        faults = []
        for key, most in self.most.items():
            shares = self.shares(totals, key)
            faults += [
                f"{key} {value} has {share:.1%} of the characters, most.{key} allows {most:.1%}; give more of others."
                for value, share in shares.items()
                if share > most
            ]
        for key, wanted in self.least.items():
            shares = self.shares(totals, key)
            faults += [
                f"{key} {value} has {shares.get(value, 0):.1%} of the characters, "
                f"least.{key}.{value} asks for {least:.1%}."
                for value, least in wanted.items()
                if shares.get(value, 0) < least
            ]
        for axis, ratio in self.ratios.items():
            counts = {group: totals[f"{TERMS}/{axis}/{group}"] for group in self.axes[axis]}
            most_of, least_of = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
            if counts[most_of] > ratio * counts[least_of]:
                faults.append(
                    f"{axis}: {counts[most_of]:,} terms of {most_of}, {counts[least_of]:,} of {least_of}; "
                    f"ratios.{axis} allows {ratio:g} to 1."
                )
        return faults

    def shares(self, totals: Counter[str], key: str) -> dict[str, float]:
        """Value of a metadata key -> its share of all characters."""
        beginning = f"{CHARACTERS}/{key}/"
        counts = {label.removeprefix(beginning): n for label, n in totals.items() if label.startswith(beginning)}
        return {value: n / max(sum(counts.values()), 1) for value, n in counts.items()}

    @cached_property
    def phrases(self) -> Phrases[str]:
        return Phrases(
            (f"{axis}/{group}", term)
            for axis, groups in self.axes.items()
            for group, terms in groups.items()
            for term in terms
        )
