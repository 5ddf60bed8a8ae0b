"""corpus=chats: conversations and preferences that people bring, checked and split."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import Draft, fingerprint, finished, locked, sha256_of, withdraw
from data_pipeline.chat import chat_faults
from data_pipeline.config import DataSet, PipelineConfig
from data_pipeline.preference import preference_faults
from data_pipeline.records import KIND, EmptySetError, read_records, write_records

SPLITS = ("train", "validation", "test")
KINDS: dict[str, Callable[[Any], list[str]]] = {"": chat_faults, "preferences_": preference_faults}
"""Beginning of the file name -> what is wrong with a record."""


@register("corpus", "chats")
@dataclass(frozen=True)
class Chats(DataSet):
    """Conversations and preferences of one's own as an artifact that training reads. Splits that are there are kept;
    where only train.jsonl or preferences_train.jsonl is, validation and test records are taken out of it.

    Args:
        path: directory with train.jsonl of {"messages": [{"role", "content"}, ...]}, preferences_train.jsonl of
            {"prompt", "chosen", "rejected"}, or both.
        validation: share of the records that become the validation split, chosen by their hash; in (0, 1).
        test: likewise for the test split; in [0, 1).
    """

    path: str = ""
    validation: float = 0.02
    test: float = 0.0

    def problems(self, config: PipelineConfig, world_size: int) -> list[Problem]:
        found = []
        if not self.path:
            found.append(
                Problem("corpus.path", "''", "the directory that holds train.jsonl or preferences_train.jsonl")
            )
        elif Path(self.path).resolve() == Path(config.run_dir).resolve():
            found.append(Problem("run_dir", config.run_dir, "another directory than corpus.path, whose files are kept"))
        if not (0 < self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            shares = f"{self.validation}, {self.test}"
            found.append(Problem("corpus.validation, corpus.test", shares, "shares above 0 and together below 1"))
        return found

    def run(self, config: PipelineConfig, resolved: dict[str, Any]) -> int:
        """Check, split, write, publish.

        Raises:
            RecordError: lists every record of a wrong shape.
            EmptySetError: there is no such file, or a split would be empty.
            OccupiedError: the directory holds an artifact of another kind.
        """
        source, directory = Path(self.path), Path(config.run_dir)
        present = [prefix for prefix in KINDS if (source / f"{prefix}train.jsonl").exists()]
        if not present:
            raise EmptySetError(
                f"{source} holds neither train.jsonl nor preferences_train.jsonl; give such a directory."
            )
        files = sorted(file for file in source.glob("*.jsonl"))
        recipe = {
            "validation": self.validation,
            "test": self.test,
            "files": {file.name: sha256_of(file) for file in files},
        }
        with locked(directory):
            if done := finished(directory, KIND, recipe, {}):
                done.verify()
                print(f"{directory} is finished ({done.id}): nothing to do", flush=True)
                return 0
            made = {
                f"{prefix}{split}": records
                for prefix in present
                for split, records in self._splits(source, prefix).items()
            }
            withdraw(directory, KIND)
            draft = Draft(directory, KIND, recipe, {})
            counts = {stem: write_records(directory / f"{stem}.jsonl", records) for stem, records in made.items()}
            draft.metrics = {"records": counts}
            draft.facts = {"source": str(source.resolve())}
            artifact = draft.publish(*(f"{stem}.jsonl" for stem in counts))
        total = ", ".join(f"{name} {number:,}" for name, number in counts.items())
        print(f"{directory} is done: {KIND} {artifact.id}, records: {total}", flush=True)
        return 0

    def _splits(self, source: Path, prefix: str) -> dict[str, list[dict[str, Any]]]:
        """Split -> records. Equal records are in the same split."""
        there = [split for split in SPLITS if (source / f"{prefix}{split}.jsonl").exists()]
        splits = {split: read_records(source, prefix + split, KINDS[prefix]) for split in there}
        if there == ["train"]:
            records, splits = splits["train"], {split: [] for split in SPLITS}
            for record in records:
                splits[self._split_of(record)].append(record)
            if not self.test:
                del splits["test"]
        if empty := [split for split in ("train", "validation") if not splits.get(split)]:
            raise EmptySetError(
                f"{source}: {prefix}{empty[0]} would hold no record. Give {prefix}{empty[0]}.jsonl, more records, or "
                "another corpus.validation."
            )
        return splits

    def _split_of(self, record: dict[str, Any]) -> str:
        place = int(fingerprint(record), 16) / 16**16
        if place < self.validation:
            return "validation"
        return "test" if place < self.validation + self.test else "train"
