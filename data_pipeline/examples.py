"""Records of people on their way into a chat artifact: read, recognised, converted, judged, split. Nothing vanishes.

What is dropped on the way is in quarantine with the step and the reason, and every step's counts add up: examples in
are examples out and dropped. No prompt is in two splits.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import LongrunError
from data_pipeline.artifact import fingerprint
from data_pipeline.chat import chat_faults
from data_pipeline.formats.base import CHAT, FORMATS, KTO, PREFERENCE, Converted, Record, recognised
from data_pipeline.kto import kto_faults
from data_pipeline.preference import preference_faults
from data_pipeline.prompts import opening
from data_pipeline.records import RecordError, found, listed
from data_pipeline.rows import READERS, Row, rows

SPLITS = ("train", "validation", "test")
PREFIXES = {CHAT: "", PREFERENCE: "preferences_", KTO: "kto_"}
"""Kind of example -> beginning of the names of its files."""
FAULTS: Mapping[str, Callable[[Any], list[str]]] = {CHAT: chat_faults, PREFERENCE: preference_faults, KTO: kto_faults}
ENDINGS = "|".join(re.escape(ending) for ending in READERS)
NAMED = re.compile(rf"(preferences_|kto_)?(train|validation|test)(-\d+-of-\d+)?({ENDINGS})")
"""Files that are read where a directory is given."""


class SharedPromptError(LongrunError):
    """Splits that were given share prompts."""


class LostExamplesError(LongrunError):
    """A step's counts do not add up: a bug, told before anything is published."""


@dataclass(frozen=True)
class Source:
    """One file of records.

    Args:
        file: where it is.
        kind: of the examples in it, where its name says so.
        split: of the examples in it.
    """

    file: Path
    kind: str | None
    split: str


@dataclass
class Example:
    """One example on its way.

    Args:
        kind: CHAT, PREFERENCE or KTO.
        record: in our own shape.
        place: file and line that it was read from.
        split: of that file.
    """

    kind: str
    record: Record
    place: str
    split: str

    @property
    def prompt(self) -> str:
        """What decides its split; see `opening`."""
        return opening(self.record)


@dataclass(frozen=True)
class Drop:
    """Why an example goes no further: `reason` in snake_case to be counted, `fault` in words."""

    reason: str
    fault: str


@dataclass
class Ledger:
    """What every step was given, passed on and dropped.

    Args:
        steps: counts by step, as the manifest has them.
        quarantine: what was dropped, as its file has it.
        findings: whatever else a step has to say, for the manifest.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    quarantine: list[Record] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)

    def enter(
        self, name: str, given: int, kept: int, dropped: Iterable[Record], counts: Mapping[str, int] | None = None
    ) -> None:
        """Write a step down.

        Raises:
            LostExamplesError: what it was given is not what it kept and dropped.
        """
        refused = [{"step": name, **drop} for drop in dropped]
        if given != kept + len(refused):
            raise LostExamplesError(f"{name} was given {given}, kept {kept} and dropped {len(refused)}.")
        reasons = Counter(drop["reason"] for drop in refused)
        step = {"name": name, "documents_in": given, "documents_out": kept, "dropped": dict(sorted(reasons.items()))}
        self.steps.append({**step, "counts": dict(counts or {})})
        self.quarantine += refused

    def sift(
        self,
        name: str,
        examples: Sequence[Example],
        drops: Mapping[int, Drop],
        counts: Mapping[str, int] | None = None,
    ) -> list[Example]:
        """The examples that a step does not drop.

        Args:
            name: of the step.
            examples: all that it saw.
            drops: index among them -> why it goes.
            counts: whatever else the step counted.
        """
        kept = [example for number, example in enumerate(examples) if number not in drops]
        dropped = [
            {"reason": drop.reason, "fault": drop.fault, "place": examples[number].place, **_shown(examples[number])}
            for number, drop in sorted(drops.items())
        ]
        self.enter(name, len(examples), len(kept), dropped, counts)
        return kept


def _shown(example: Example) -> Record:
    return {"kind": example.kind, "record": example.record}


def sources(path: Path) -> tuple[list[Source], list[Path]]:
    """Files to be read, and those of the directory that could be but are not named for it.

    Args:
        path: a directory with {,preferences_,kto_}{train,validation,test} files, or one file, which is for training.
    """
    if not path.is_dir():
        return ([Source(path, None, "train")] if path.exists() else []), []
    known = {prefix: kind for kind, prefix in PREFIXES.items() if prefix}
    files, left = [], []
    for file in sorted(path.iterdir()):
        if match := NAMED.fullmatch(file.name):
            files.append(Source(file, known.get(match[1]), match[2]))
        elif file.name.endswith(tuple(READERS)):
            left.append(file)
    return files, left


def convert(
    files: Sequence[Source], form: str, rename: Mapping[str, str], quarantine: bool, ledger: Ledger
) -> list[Example]:
    """Every record of the files in our own shapes.

    Args:
        files: what is read.
        form: name of a format; empty recognises each record for itself.
        rename: our name -> the name that the records use.
        quarantine: drop records with a fault; else any stops with an error.
        ledger: written to.

    Raises:
        RecordError: lists every record with a fault.
        FileError: a file is damaged.
    """
    examples: list[Example] = []
    bad: list[str] = []
    dropped: list[Record] = []
    counts: Counter[str] = Counter()
    given = 0
    for source in files:
        for row in rows(source.file):
            given += 1
            made, name, reason, faults = converted(row, form, rename, source.kind)
            counts[name] += 1
            if faults:
                bad += [f"{source.file}:{row.number}: {fault}" for fault in faults]
                kept = {"beginning": row.beginning} if row.reason else {"record": row.value}
                place = f"{source.file.name}:{row.number}"
                dropped.append({"reason": reason, "fault": "; ".join(faults), "place": place, **kept})
            examples += [
                Example(one.kind, one.record, f"{source.file.name}:{row.number}", source.split)
                for one in made
                if not faults
            ]
    if bad and not quarantine:
        raise RecordError(
            listed(bad, "fault", files[0].file if len(files) == 1 else files[0].file.parent)
            + "\nMend them, or set corpus.bad=quarantine to go on without these records."
        )
    ledger.enter("convert", given, given - len(dropped), dropped, {**counts, "examples": len(examples)})
    return examples


def converted(
    row: Row, form: str, rename: Mapping[str, str], kind: str | None
) -> tuple[list[Converted], str, str, list[str]]:
    """Examples of a row, the name of its format, and the reason and the faults where it has any."""
    if row.reason:
        return [], "unreadable", row.reason, [row.fault]
    if not isinstance(row.value, dict):
        fault = f"{found(row.value)}; expected an object of one of the formats {', '.join(FORMATS)}"
        return [], "unknown", "no_object", [fault]
    record = {key: value for key, value in row.value.items() if key not in rename.values()}
    record |= {ours: row.value[theirs] for ours, theirs in rename.items() if theirs in row.value}
    names = [form] if form else recognised(record)
    if not names:
        keys = "; ".join(f"{name}: {', '.join(each.keys)}" for name, each in sorted(FORMATS.items()))
        return [], "unknown", "unknown_format", [f"has {', '.join(record) or 'no key'}; expected those of {keys}"]
    if len(names) > 1:
        fault = f"has the keys of {' and of '.join(names)}; expected those of one, or corpus.format set to either"
        return [], "ambiguous", "ambiguous_format", [fault]
    name = names[0]
    if missing := [key for key in FORMATS[name].keys if record.get(key) is None]:
        return [], name, "wrong_shape", [f"{key} is missing; format {name} has it" for key in missing]
    faults: list[str] = []
    made = FORMATS[name].convert(record, faults)
    if not faults:
        # What several examples of one record share is told once.
        faults = list(dict.fromkeys(fault for one in made for fault in FAULTS[one.kind](one.record)))
    if not faults and kind and any(one.kind != kind for one in made):
        faults = [f"a record of format {name} in a file whose name says {kind}; put it into a file of its own"]
    return made, name, "wrong_shape", faults


def check_splits(examples: Sequence[Example]) -> None:
    """Refuse splits that were given and share prompts.

    Raises:
        SharedPromptError: lists the prompts and where each stands.
    """
    first: dict[str, dict[str, str]] = {}
    whole = _whole(examples)
    for example in examples:
        if example.kind in whole:
            continue
        first.setdefault(example.prompt, {}).setdefault(example.split, example.place)
    shared = [
        f"{json.dumps(prompt[:80], ensure_ascii=False)} in {' and '.join(places.values())}"
        for prompt, places in first.items()
        if len(places) > 1
    ]
    if shared:
        raise SharedPromptError(
            listed(shared, "prompt", "several splits")
            + "\nTake them out of one, or give train alone and let corpus.validation split it."
        )


def split(examples: Sequence[Example], validation: float, test: float) -> dict[str, list[Record]]:
    """File stem -> records. Where only a train file is given, validation and test are taken out of it.

    A prompt's split is a function of the prompt, or that of the file that gives it: it is the same for conversations,
    preferences and answers with a label.

    Args:
        examples: of splits that share no prompt.
        validation: share of the prompts, in (0, 1).
        test: likewise; in [0, 1).
    """
    kinds = _splits_given(examples)
    whole = _whole(examples)
    fixed = {example.prompt: example.split for example in examples if example.kind not in whole}
    made: dict[str, list[Record]] = {}
    for kind, prefix in PREFIXES.items():
        wanted = SPLITS[: 3 if test else 2] if kind in whole else [s for s in SPLITS if s in kinds[kind]]
        made |= {f"{prefix}{name}": [] for name in wanted}
    for example in examples:
        place = example.split
        if example.kind in whole:
            place = fixed.get(example.prompt) or _drawn(example.prompt, validation, test)
        made.setdefault(f"{PREFIXES[example.kind]}{place}", []).append(example.record)
    return made


def _splits_given(examples: Sequence[Example]) -> dict[str, set[str]]:
    return {kind: {example.split for example in examples if example.kind == kind} for kind in PREFIXES}


def _whole(examples: Sequence[Example]) -> set[str]:
    """Kinds that come in one piece, to be split."""
    return {kind for kind, there in _splits_given(examples).items() if there == {"train"}}


def _drawn(prompt: str, validation: float, test: float) -> str:
    place = int(fingerprint(prompt), 16) / 16**16
    if place < validation:
        return "validation"
    return "test" if place < validation + test else "train"
