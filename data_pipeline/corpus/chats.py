"""corpus=chats: conversations and preferences that people bring, recognised, checked, converted and split."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import sha256_of
from data_pipeline.config import DataSet, PipelineConfig
from data_pipeline.evaluation_sets import set_name
from data_pipeline.examples import Example, Ledger, Source, check_splits, convert, sources
from data_pipeline.formats.base import FORMATS, Record
from data_pipeline.judge import Judging, graded
from data_pipeline.publishing import parted, published
from data_pipeline.records import EmptySetError
from data_pipeline.repeats import (
    EXACT,
    NEAR,
    contaminated,
    duplicates,
    near_duplicates,
    read_sets,
    state_of,
)

BAD = ("refuse", "quarantine")
DUPLICATES = ("", EXACT, NEAR)
GRADES = "judge/grades.jsonl"
"""No part of the artifact: what the judge said, so that nothing is asked twice."""


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
        rename: our name of a field -> the name that the records use: '+corpus.rename={prompt: question}'.
        bad: what happens to records with a fault: "refuse" lists them all and stops, "quarantine" goes on without.
        validation: share of the prompts whose records become the validation split, chosen by hash; in (0, 1).
        test: likewise for the test split; in [0, 1).
        deduplicate: "exact" drops what is there twice, prompt and answer; "near" also examples whose prompt is nearly
            that of another; empty keeps all.
        similarity: share of their sets of three words in a row, in (0, 1], from which on prompts are nearly the same.
        evaluation_sets: files or directories of what the model will be tested on; examples for training that hold an
            item of theirs are dropped.
        overlap: words in a row, at least, that an item and an example share.
        judge: the model that grades answers, and what must be reached; see `data_pipeline.judge.Judging`.
    """

    path: str = ""
    format: str = ""
    rename: dict[str, str] = field(default_factory=dict)
    bad: str = "refuse"
    validation: float = 0.02
    test: float = 0.0
    deduplicate: str = ""
    similarity: float = 0.8
    evaluation_sets: list[str] = field(default_factory=list)
    overlap: int = 13
    judge: Judging = field(default_factory=Judging)

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
        if self.deduplicate not in DUPLICATES:
            found.append(Problem("corpus.deduplicate", self.deduplicate, "exact, near, or empty to keep all"))
        if not 0 < self.similarity <= 1:
            found.append(Problem("corpus.similarity", self.similarity, "a share in (0, 1]"))
        if self.overlap < 1:
            found.append(Problem("corpus.overlap", self.overlap, "at least 1 word"))
        gone = [path for path in self.evaluation_sets if not Path(path).exists()]
        found += [Problem("corpus.evaluation_sets", path, "the path of a file or directory") for path in gone]
        if len(set(map(set_name, self.evaluation_sets))) < len(self.evaluation_sets):
            fix = "paths that end in different names"
            found.append(Problem("corpus.evaluation_sets", ", ".join(self.evaluation_sets), fix))
        found += self.judge.problems("corpus.judge")
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
            EvaluationSetError: an evaluation set cannot be read.
            JudgeError: the judge cannot be asked, or fails on too many records.
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
        kept = directory / GRADES
        return published(directory, self._recipe(files), lambda ledger: self._splits(self._sifted(files, kept, ledger)))

    def _recipe(self, files: list[Source]) -> dict[str, Any]:
        """What decides the result."""
        return {
            "validation": self.validation,
            "test": self.test,
            "format": self.format,
            "rename": dict(self.rename),
            "bad": self.bad,
            "deduplicate": [self.deduplicate, self.similarity],
            "evaluation_sets": [state_of(read_sets(self.evaluation_sets)), self.overlap],
            "judge": self.judge.decisive(),
            "files": {source.file.name: sha256_of(source.file) for source in files},
        }

    def _sifted(self, files: list[Source], kept: Path, ledger: Ledger) -> list[Example]:
        """The examples that all steps pass on; grades are kept in a file."""
        examples = convert(files, self.format, self.rename, self.bad == "quarantine", ledger)
        check_splits(examples)
        if self.deduplicate:
            examples = ledger.sift("deduplicate", examples, duplicates(examples))
        if self.deduplicate == NEAR:
            examples = ledger.sift("near_duplicates", examples, near_duplicates(examples, self.similarity))
        if self.evaluation_sets:
            sets = read_sets(self.evaluation_sets)
            examples = ledger.sift("decontaminate", examples, contaminated(examples, sets, self.overlap))
        if self.judge.target:
            examples = graded(examples, self.judge, kept, ledger)
        return examples

    def _splits(self, examples: list[Example]) -> dict[str, list[Record]]:
        """File stem -> records, none of them empty."""
        return parted(examples, self.validation, self.test, self.path)
