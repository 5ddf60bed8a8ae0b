"""A chat artifact: its splits, its quarantine, its manifest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.artifact import Draft, finished, locked, withdraw
from data_pipeline.card import chats as card
from data_pipeline.card.page import PAGE
from data_pipeline.examples import PREFIXES, SPLITS, Example, Ledger, split
from data_pipeline.formats.base import Record
from data_pipeline.records import KIND, EmptySetError, write_records

QUARANTINE = "quarantine/chats.jsonl"


def parted(examples: list[Example], validation: float, test: float, source: str) -> dict[str, list[Record]]:
    """File stem -> records, none of them empty.

    Raises:
        EmptySetError: a split would be empty.
    """
    if not examples:
        raise EmptySetError(f"{source} holds no record that can be used; there is nothing to train on.")
    splits = split(examples, validation, test)
    for prefix in PREFIXES.values():
        there = [name for name in SPLITS if f"{prefix}{name}" in splits]
        needed = ("train", "validation") if there else ()
        if empty := [name for name in needed if not splits.get(f"{prefix}{name}")]:
            raise EmptySetError(
                f"{source}: {prefix}{empty[0]} would hold no record. Give {prefix}{empty[0]}.jsonl, more records, or "
                "another corpus.validation."
            )
    return splits


def published(directory: Path, recipe: dict[str, Any], make: Callable[[Ledger], dict[str, list[Record]]]) -> int:
    """A chat artifact, made or found made; returns the exit code.

    Args:
        directory: becomes the artifact.
        recipe: what decides the result.
        make: gives file stem -> records, and writes into the ledger what it dropped.
    """
    with locked(directory):
        if done := finished(directory, KIND, recipe, {}):
            done.verify()
            print(f"{directory} is finished ({done.id}): nothing to do", flush=True)
            return 0
        ledger = Ledger()
        made = make(ledger)
        withdraw(directory, KIND)
        draft = Draft(directory, KIND, recipe, {})
        counts = {stem: write_records(directory / f"{stem}.jsonl", records) for stem, records in made.items()}
        (directory / QUARANTINE).parent.mkdir(exist_ok=True)
        write_records(directory / QUARANTINE, ledger.quarantine)
        draft.metrics = {"records": counts, "steps": ledger.steps, **ledger.findings}
        card.write(directory, draft.metrics, recipe, made, ledger.quarantine)
        artifact = draft.publish(*(f"{stem}.jsonl" for stem in counts), QUARANTINE, PAGE)
    total = ", ".join(f"{name} {number:,}" for name, number in counts.items())
    print(f"{directory} is done: {KIND} {artifact.id}, records: {total}", flush=True)
    if ledger.quarantine:
        print(f"{len(ledger.quarantine):,} are in {directory / QUARANTINE}, each with step and reason", flush=True)
    return 0
