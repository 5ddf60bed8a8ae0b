"""corpus=chats: conversations and preferences that people bring, recognised, checked, converted and split."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import Draft, finished, locked, sha256_of, withdraw
from data_pipeline.config import DataSet, PipelineConfig
from data_pipeline.examples import PREFIXES, SPLITS, Example, Ledger, Source, check_splits, convert, sources, split
from data_pipeline.formats.base import FORMATS, Record
from data_pipeline.records import KIND, EmptySetError, write_records

BAD = ("refuse", "quarantine")
QUARANTINE = "quarantine/chats.jsonl"


@register("corpus", "chats")
@dataclass(frozen=True)
class Chats(DataSet):
    """Records of one's own as an artifact that training reads: conversations, preferences, answers with a label, in any
    format that `data_pipeline/formats` has. Splits that are there are kept, and must share no prompt; where only a
    train file is, validation and test records are taken out of it.

    Args:
        path: a file, or a directory with {train,validation,test} and preferences_ or kto_ before it, as .jsonl,
            .jsonl.gz, .jsonl.zst, .json (an array) or .parquet.
        format: of the records; empty recognises each for itself.
        rename: our name of a field -> the name that the records use, such as {prompt: question}.
        bad: what happens to records with a fault: "refuse" lists them all and stops, "quarantine" goes on without.
        validation: share of the prompts whose records become the validation split, chosen by hash; in (0, 1).
        test: likewise for the test split; in [0, 1).
    """

    path: str = ""
    format: str = ""
    rename: dict[str, str] = field(default_factory=dict)
    bad: str = "refuse"
    validation: float = 0.02
    test: float = 0.0

    def problems(self, config: PipelineConfig, world_size: int) -> list[Problem]:
        found = []
        if not self.path:
            fix = "a file of records, or the directory that holds train.jsonl or preferences_train.jsonl"
            found.append(Problem("corpus.path", "''", fix))
        elif Path(self.path).resolve() == Path(config.run_dir).resolve():
            found.append(Problem("run_dir", config.run_dir, "another directory than corpus.path, whose files are kept"))
        if self.format and self.format not in FORMATS:
            fix = f"one of {', '.join(sorted(FORMATS))}, or empty to recognise each record"
            found.append(Problem("corpus.format", self.format, fix))
        if self.bad not in BAD:
            found.append(Problem("corpus.bad", self.bad, f"one of {', '.join(BAD)}"))
        if not (0 < self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            shares = f"{self.validation}, {self.test}"
            found.append(Problem("corpus.validation, corpus.test", shares, "shares above 0 and together below 1"))
        return found

    def run(self, config: PipelineConfig, resolved: dict[str, Any]) -> int:
        """Convert, check, split, write, publish.

        Raises:
            RecordError: lists every record of a wrong shape.
            FileError: a file is damaged.
            SharedPromptError: splits that are there share prompts; lists them.
            EmptySetError: there is no such file, or a split would be empty.
            OccupiedError: the directory holds an artifact of another kind.
        """
        files, unread = sources(Path(self.path))
        if not files:
            raise EmptySetError(
                f"{self.path} holds neither train.jsonl nor preferences_train.jsonl; give such a directory, or a file."
            )
        if unread:
            print(f"not read, for their names say no split: {', '.join(file.name for file in unread)}")
        directory = Path(config.run_dir)
        return published(directory, self._recipe(files), lambda ledger: self._splits(self._sifted(files, ledger)))

    def _recipe(self, files: list[Source]) -> dict[str, Any]:
        """What decides the result."""
        return {
            "validation": self.validation,
            "test": self.test,
            "format": self.format,
            "rename": dict(self.rename),
            "bad": self.bad,
            "files": {source.file.name: sha256_of(source.file) for source in files},
        }

    def _sifted(self, files: list[Source], ledger: Ledger) -> list[Example]:
        """The examples that all steps pass on."""
        return convert(files, self.format, self.rename, self.bad == "quarantine", ledger)

    def _splits(self, examples: list[Example]) -> dict[str, list[Record]]:
        """File stem -> records, none of them empty."""
        return parted(examples, self.validation, self.test, self.path)


def parted(examples: list[Example], validation: float, test: float, source: str) -> dict[str, list[Record]]:
    """File stem -> records, none of them empty.

    Raises:
        SharedPromptError: splits that were given share prompts; lists them.
        EmptySetError: a split would be empty.
    """
    if not examples:
        raise EmptySetError(f"{source} holds no record that can be used; there is nothing to train on.")
    check_splits(examples)
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
        artifact = draft.publish(*(f"{stem}.jsonl" for stem in counts), QUARANTINE)
    total = ", ".join(f"{name} {number:,}" for name, number in counts.items())
    print(f"{directory} is done: {KIND} {artifact.id}, records: {total}", flush=True)
    if ledger.quarantine:
        print(f"{len(ledger.quarantine):,} are in {directory / QUARANTINE}, each with step and reason", flush=True)
    return 0
