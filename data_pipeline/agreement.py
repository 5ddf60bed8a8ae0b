"""Do annotators agree? Chance-corrected measures, disagreements, and annotators who stand apart.

Shape suffixes: I items, C categories (the labels in use, in order).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

Label = str | int | float
Votes = Mapping[str, Mapping[str, Label]]
"""Item -> annotator -> label; who did not vote on an item is not in it."""

NOMINAL, ORDINAL, INTERVAL = "nominal", "ordinal", "interval"
LEVELS = (NOMINAL, ORDINAL, INTERVAL)
"""What a difference of labels means: another label; ranks between them; their distance as numbers."""

MAJORITY, UNANIMITY = "majority", "unanimity"
RULES = (MAJORITY, UNANIMITY)

SIGNIFICANCE = 0.01
"""Chance of flagging any annotator where all are alike; see `standing`."""
GAP = 0.1
"""Least difference of agreement that counts as well below the others."""


def category_counts(votes: Votes) -> tuple[np.ndarray, list[Label]]:
    """How many annotators gave an item each label, for the items that at least two labelled, and the labels."""
    several = [list(labels.values()) for labels in votes.values() if len(labels) > 1]
    categories = sorted(
        {label for labels in several for label in labels}, key=lambda label: (isinstance(label, str), label)
    )
    number = {label: place for place, label in enumerate(categories)}
    counts = np.zeros((len(several), len(categories)))
    for item, labels in enumerate(several):
        for label in labels:
            counts[item, number[label]] += 1
    return counts, categories


def cohen_kappa(votes: Votes, one: str, other: str) -> tuple[float | None, int]:
    """Agreement of two annotators beyond chance (Cohen 1960), on the items that both labelled.

    Returns:
        kappa, None where both gave one label throughout, so that chance explains all; and the number of items.
    """
    pairs = [(labels[one], labels[other]) for labels in votes.values() if one in labels and other in labels]
    if not pairs:
        return None, 0
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    by_chance = sum(first[label] * second[label] for label in first) / len(pairs) ** 2
    return _beyond(sum(a == b for a, b in pairs) / len(pairs), by_chance), len(pairs)


def fleiss_kappa(votes: Votes) -> float | None:
    """Agreement of several annotators beyond chance (Fleiss 1971), each pair of votes on an item taken alike.

    Items may have different numbers of votes, at least two; where all have the same it is Fleiss's value. None where
    there are no such items, or only one label.
    """
    counts, _ = category_counts(votes)
    if not len(counts):
        return None
    raters_I = counts.sum(1)
    agreed_I = (counts * (counts - 1)).sum(1) / (raters_I * (raters_I - 1))
    share_C = counts.sum(0) / counts.sum()
    return _beyond(float(agreed_I.mean()), float((share_C**2).sum()))


def krippendorff_alpha(votes: Votes, level: str = NOMINAL) -> float | None:
    """1 - observed / expected disagreement (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Args:
        votes: missing ones are left out as the measure does.
        level: one of `LEVELS`; labels are numbers unless it is nominal.

    Returns:
        alpha, None where no item has two votes, or only one label is in use.

    Raises:
        ValueError: there is no such level.
    """
    if level not in LEVELS:
        raise ValueError(f"no level of measurement {level!r}; expected one of {', '.join(LEVELS)}")
    counts, categories = category_counts(votes)
    if len(categories) < 2:
        return None
    coincidences_CC = ((counts.T / (counts.sum(1) - 1)) @ counts) - np.diag((counts.T / (counts.sum(1) - 1)).sum(1))
    total_C = coincidences_CC.sum(1)
    distance_CC = _distances(level, categories, total_C)
    expected = (np.outer(total_C, total_C) * distance_CC).sum() / (total_C.sum() - 1)
    return 1 - float((coincidences_CC * distance_CC).sum() / expected)


def _distances(level: str, categories: Sequence[Label], total_C: np.ndarray) -> np.ndarray:
    if level == NOMINAL:
        return 1 - np.eye(len(categories))
    if level == ORDINAL:
        # The number of votes that lie between two labels, their own counted half.
        place_C = np.cumsum(total_C) - total_C / 2
    else:
        place_C = np.asarray(categories, dtype=float)
    return np.subtract.outer(place_C, place_C) ** 2


def _beyond(observed: float, by_chance: float) -> float | None:
    return None if math.isclose(by_chance, 1) else (observed - by_chance) / (1 - by_chance)


def majority(labels: Sequence[Label]) -> Label | None:
    """The label that more than half gave; None where there is none."""
    if not labels:
        return None
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else None


def decided(labels: Sequence[Label], rule: str) -> Label | None:
    """The label of an item by a rule of `RULES`; None where its annotators did not decide."""
    label = majority(labels)
    return label if rule == MAJORITY or len(set(labels)) == 1 else None


@dataclass(frozen=True)
class Standing:
    """How one annotator stands to the others.

    Args:
        annotator: who.
        votes: how many.
        compared: items on which the others, at least two, have a majority.
        agreement: share of those on which the annotator is with it; None where there are none.
        others: the same of all others together.
        p: probability of agreeing so little or less, were the annotator like the others, times the number of
            annotators (Bonferroni); at most 1.
        weak: p is below SIGNIFICANCE and the agreement at least GAP below the others'.
    """

    annotator: str
    votes: int
    compared: int
    agreement: float | None
    others: float | None
    p: float
    weak: bool


def standing(votes: Votes) -> list[Standing]:
    """Every annotator's agreement with the majority of the others, against that of the others: Fisher's exact test,
    one-sided (Fisher 1922). Who is weak lowers the others' agreement too, so that the test errs to the mild side."""
    annotators = sorted({annotator for labels in votes.values() for annotator in labels})
    compared, agreed = Counter[str](), Counter[str]()
    for labels in votes.values():
        for annotator, label in labels.items():
            rest = [other for name, other in labels.items() if name != annotator]
            wanted = majority(rest) if len(rest) > 1 else None
            if wanted is not None:
                compared[annotator] += 1
                agreed[annotator] += label == wanted
    found = []
    for annotator in annotators:
        n, k = compared[annotator], agreed[annotator]
        others_n, others_k = compared.total() - n, agreed.total() - k
        own, others = (k / n if n else None), (others_k / others_n if others_n else None)
        p = min(1.0, len(annotators) * _at_most(k, n, others_k, others_n))
        weak = own is not None and others is not None and p < SIGNIFICANCE and own <= others - GAP
        number = sum(annotator in labels for labels in votes.values())
        found.append(Standing(annotator, number, n, own, others, p, weak))
    return found


def _at_most(k: int, n: int, others_k: int, others_n: int) -> float:
    """Probability of k or fewer agreements among n items drawn from all n + others_n, of which k + others_k agree."""

    def log_ways(whole: int, part: int) -> float:
        return math.lgamma(whole + 1) - math.lgamma(part + 1) - math.lgamma(whole - part + 1)

    agreed, total = k + others_k, n + others_n
    least = max(0, n - (total - agreed))
    return math.fsum(
        math.exp(log_ways(agreed, i) + log_ways(total - agreed, n - i) - log_ways(total, n))
        for i in range(least, k + 1)
    )


def report(votes: Votes, level: str) -> dict[str, Any]:
    """All measures, as JSON."""
    annotators = sorted({annotator for labels in votes.values() for annotator in labels})
    pairs = {f"{one} and {other}": cohen_kappa(votes, one, other) for one, other in combinations(annotators, 2)}
    return {
        "items": len(votes),
        "votes": sum(map(len, votes.values())),
        "items_with_two_votes": sum(len(labels) > 1 for labels in votes.values()),
        "level": level,
        "krippendorff_alpha": krippendorff_alpha(votes, level),
        "fleiss_kappa": fleiss_kappa(votes),
        "cohen_kappa": {names: {"kappa": kappa, "items": items} for names, (kappa, items) in pairs.items() if items},
        "annotators": [asdict(one) for one in standing(votes)],
    }
