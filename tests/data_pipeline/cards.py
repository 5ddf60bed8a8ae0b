"""A made-up corpus, for pages that are drawn without making one."""

from typing import Any

from data_pipeline.card.samples import Pair, Sample

SIZES = {
    "documents": 7,
    "bytes": 9000,
    "characters": 8900,
    "words": 1500,
    "tokens": 2500,
    "bytes_per_token": 3.6,
    "characters_per_token": 3.56,
    "tokens_per_word": 1.67,
}


def step(name: str, given: int, dropped: dict[str, int], counts: dict[str, int] | None = None) -> dict[str, Any]:
    """What the manifest says of a step."""
    out = given - sum(dropped.values())
    return {
        "name": name,
        "documents_in": given,
        "judged": given,
        "documents_out": out,
        "characters_in": 4000 * given,
        "characters_out": 3990 * out,
        "dropped": dropped,
        "counts": counts or {},
    }


def metrics(sources: int = 12, idle_steps: int = 2) -> dict[str, Any]:
    """Of a corpus of so many sources, with so many steps that drop nothing before each of those that drop."""
    licences = ("BSD-3-Clause", "MIT", "PSF-2.0")
    names = [f"package {number:03}" for number in range(sources)]
    sizes = [100 * (sources - number) for number in range(sources)]
    total = sum(sizes)
    dropping: list[tuple[str, dict[str, int], dict[str, int]]] = [
        ("read", {"not_utf8": 7, "empty": 23}, {}),
        ("language", {"other_language": total // 20}, {}),
        ("gopher_quality", {"few_letters": total // 90, "stop_words": total // 30, "word_length": 5, "symbols": 2}, {}),
        ("pii", {"too_much": 11}, {"email": 812, "phone": 31, "ip": 90, "secret": 3}),
        ("minhash", {"near_duplicate": total // 9}, {}),
        ("decontamination", {"contaminated": 4}, {"strategyqa: documents": 3, "strategyqa: items": 2}),
        (
            "representation",
            {},
            {
                "terms/pronouns/she": 900,
                "documents/pronouns/she": 700,
                "terms/pronouns/he": 1400,
                "characters/source/a/b": 9,
            },
        ),
    ]
    steps, given = [], total + 30
    for name, dropped, counts in dropping:
        if name != "read":
            steps += [step(f"{name}_before_{number}", given, {}) for number in range(idle_steps)]
        steps.append(step(name, given, dropped, counts))
        given = steps[-1]["documents_out"]
    lengths = {str(place): 1 + 400 // (1 + abs(place - 24)) for place in range(14, 36)}
    kept = {
        "length": {place: count * 4 // 5 for place, count in lengths.items()},
        "year": {"": 40, "2021": 700, "2022": 300, "2024": 1000},
        "language": {"en": 9000, "de": 20},
        "kind": {"prose": 8000, "code": 1020},
        "score": {"language_score": {"0.6": 80, "0.9": 700, "0.95": 9000}},
        "copies": {"near_duplicates": {"0": 300, "2": 40, "3": 12, "6": 1}},
    }
    read = {
        "length": lengths,
        "year": {"": 50, "2021": 900, "2022": 310, "2024": 1000},
        "language": {"en": 9500, "de": 700, "fr": 80},
        "kind": {"prose": 9000, "code": 1100},
    }
    splits = {"train": given - 2 * (given // 50), "validation": given // 50, "test": given // 50}
    return {
        "sources": [
            {
                "name": name,
                "version": f"1.{number}",
                "licence": licences[number % 3],
                "url": f"https://example.org/{number}",
                "documents": size,
                "bytes": size * 4000,
            }
            for number, (name, size) in enumerate(zip(names, sizes, strict=True))
        ],
        "steps": steps,
        "splits": {
            name: {"documents": count, "tokens": count * 1000, "bytes": count * 4100, "largest_token": 9}
            for name, count in splits.items()
        },
        "tokens": [
            {"source": name, "licence": licences[number % 3], "splits": {"train": size * 900, "validation": size * 18}}
            for number, (name, size) in enumerate(zip(names, sizes, strict=True))
        ],
        "lengths": {"train": lengths},
        "portrait": {"read": read, "kept": kept},
        "tokenizer": {
            "all": SIZES,
            "language": {"en": SIZES, "": SIZES},
            "source": {name: SIZES for name in names},
            "unused": 3,
            "unused_examples": ["x", "y"],
            "longest": [{"token": " configuration", "count": 58}],
            "fragments": 0.001,
            "unknown": 0.0,
            "lossless": True,
            "round_trip": {},
        },
    }


TOPICS = {
    "pii": "personal",
    "minhash": "duplicates",
    "decontamination": "contamination",
    "representation": "representation",
}
SETTINGS: dict[str, Any] = {
    "steps": [
        ["minhash", "MinHash", {"bands": 14, "rows": 8}, None],
        ["pii", "PII", {"email": "replace"}, None],
        ["decontamination", "Decontamination", {"n": 13}, {"strategyqa": {"items": 229}, "gsm8k": {"items": 1319}}],
    ],
    "sources": {},
    "validation": 0.02,
    "vocabulary": 4096,
}


def sample(text: str | None, name: str = "package 001/docs/index.rst") -> Sample:
    return Sample("" if text is None else name, "package 001", "MIT", 1234, text)


def contents(**changes: Any) -> dict[str, Any]:
    """Arguments of `render`."""
    text = "A page about nothing in particular.\n\nIt goes on like this for a while, and says little.\n" * 3
    return {
        "metrics": metrics(),
        "settings": SETTINGS,
        "topics": TOPICS,
        "dropped": {
            "gopher_quality": {"stop_words": [sample("x y z " * 40), sample("1 2 3 " * 20)]},
            "pii": {"too_much": [sample(None)]},
        },
        "kept": [sample(text) for _ in range(4)],
        "pairs": [Pair("near_duplicate", sample(text), sample(text + "."))],
    } | changes
