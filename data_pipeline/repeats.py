"""Examples that are there twice, whose prompts are nearly the same, or that hold what a model is tested on.

Shape suffixes: P prompts, B bands of a signature.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.artifact import fingerprint
from data_pipeline.evaluation_sets import Item, read_set, set_name
from data_pipeline.examples import Drop, Example
from data_pipeline.formats.base import Record
from data_pipeline.overlap import Index, Match
from data_pipeline.prompts import normalised
from data_pipeline.shingles import MinHash, joined, simplified_words

EXACT, NEAR = "exact", "near"
SIGNATURE = MinHash(n=3, bands=20, rows=5)
"""Prompts are short. Two that share 0.8 of their shingles are compared with probability 0.9996, 0.6 with 0.80."""
SHORTEST = 5
"""Words of the shortest evaluation item that is looked for."""


def content(example: Example) -> str:
    """What makes two examples one: prompts but for case, forms of characters and white space, answers but for white
    space."""
    record = example.record
    parts = [[_said(message) for message in record.get(key, [])] for key in ("messages", "prompt")]
    answers = [[_said(message) for message in record.get(key, [])] for key in ("chosen", "rejected", "completion")]
    return fingerprint([example.kind, parts, answers, record.get("label"), record.get("tools")])


def _said(message: Record) -> list[Any]:
    said = message["content"]
    same = " ".join(said.split()) if message["role"] == "assistant" else normalised(said)
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return [message["role"], same, calls, message.get("weight", 1)]


def duplicates(examples: Sequence[Example]) -> dict[int, Drop]:
    """Examples of which an equal one stays: that of a validation or test file, else the first."""
    kept: dict[str, str] = {}
    drops = {}
    for number in _held_out_first(examples):
        key = content(examples[number])
        if key in kept:
            drops[number] = Drop("duplicate", f"the same as {kept[key]}")
        kept.setdefault(key, examples[number].place)
    return drops


def near_duplicates(examples: Sequence[Example], similarity: float) -> dict[int, Drop]:
    """Examples whose prompt is nearly that of one that stays, which is never itself dropped. Examples of one prompt
    stay or go together.

    Args:
        examples: all.
        similarity: least Jaccard similarity of the sets of three words in a row that makes prompts nearly the same;
            those that MinHash finds are compared exactly.
    """
    words = simplified_words(numbers=False)
    places: dict[str, str] = {}
    for number in _held_out_first(examples):
        places.setdefault(examples[number].prompt, examples[number].place)
    prompts = list(places)
    signatures = [b"".join(band[:8] for band in SIGNATURE.digests(words.of(prompt))) for prompt in prompts]
    groups_PB = _groups(signatures)
    kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    shingles: dict[int, frozenset[bytes]] = {}
    near: dict[str, Drop] = {}
    for number in np.flatnonzero((groups_PB >= 0).any(1)).tolist():
        own = [(band, group) for band, group in enumerate(groups_PB[number].tolist()) if group >= 0]
        shingles[number] = frozenset(joined(words.of(prompts[number]), SIGNATURE.n))
        for other in sorted({other for band in own for other in kept[band]}):
            shared = _jaccard(shingles[number], shingles[other])
            if shared >= similarity:
                fault = f"the prompt is that of {places[prompts[other]]} by {shared:.2f}"
                near[prompts[number]] = Drop("near_duplicate", fault)
                del shingles[number]
                break
        else:
            for band in own:
                kept[band].append(number)
    return {number: near[example.prompt] for number, example in enumerate(examples) if example.prompt in near}


def _groups(signatures: Sequence[bytes]) -> np.ndarray:
    """For each prompt and band the number of the group of prompts that have this band alike; -1 where it is alone.

    Args:
        signatures: 8 bytes of each band; empty for a prompt of too few words.
    """
    groups_PB = np.full((len(signatures), SIGNATURE.bands), -1)
    long_enough = [number for number, signature in enumerate(signatures) if signature]
    hashes = np.frombuffer(b"".join(signatures), dtype=np.uint64).reshape(-1, SIGNATURE.bands)
    for band in range(SIGNATURE.bands):
        _, group, count = np.unique(hashes[:, band], return_inverse=True, return_counts=True)
        groups_PB[long_enough, band] = np.where(count[group] > 1, group, -1)
    return groups_PB


def _held_out_first(examples: Sequence[Example]) -> list[int]:
    """What training and evaluation files share is to go from training."""
    return sorted(range(len(examples)), key=lambda number: examples[number].split == "train")


def _jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    return len(one & other) / len(one | other)


def read_sets(paths: Sequence[str]) -> dict[str, list[Item]]:
    """Name of an evaluation set -> what it asks.

    Raises:
        EvaluationSetError: one cannot be read.
    """
    return {set_name(path): read_set(path) for path in paths}


def state_of(sets: Mapping[str, Sequence[Item]]) -> dict[str, str]:
    """What decides the contamination found."""
    return {name: fingerprint([[item.query, item.labels] for item in items]) for name, items in sets.items()}


def contaminated(examples: Sequence[Example], sets: Mapping[str, Sequence[Item]], n: int) -> dict[int, Drop]:
    """Examples for training that hold an item of an evaluation set: n words in a row of its question and answer, or
    all of a shorter one.

    Args:
        examples: all; those of validation and test files are left alone.
        sets: by name.
        n: words in a run.
    """
    names = [name for name, items in sets.items() for _ in items]
    match = Match(n, SHORTEST, queries=True, crossing=True, numbers=False, share=0.0)
    index = Index.of((item for items in sets.values() for item in items), match)
    drops = {}
    for number, example in enumerate(examples):
        if example.split == "train" and (held := index.find(" ".join(_texts(example.record)).split()).items):
            of = sorted({names[item] for item in held})
            drops[number] = Drop("contaminated", f"holds {len(held)} items of {', '.join(of)}")
    return drops


def _texts(record: Record) -> Iterator[str]:
    for key in ("messages", "prompt", "chosen", "rejected", "completion"):
        yield from (message["content"] for message in record.get(key, []))
