"""`corpus=ngram`: a small model of reference text, for the curation step `perplexity`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import LongrunError, Problem
from conf.registry import register
from data_pipeline.artifact import Draft, finished, locked, sha256_of, withdraw
from data_pipeline.config import DataSet, PipelineConfig
from data_pipeline.ngram import FILE, HIGHEST_ORDER, train

KIND = "ngram"


class ReferenceTextError(LongrunError):
    """The reference text cannot be read, or there is none."""


@register("corpus", "ngram")
@dataclass(frozen=True)
class NGramModel(DataSet):
    """Count the bytes of reference text by those before them.

    Args:
        paths: text files in UTF-8, or directories of them: text as the corpus should be, some megabytes.
        order: bytes of the longest n-gram, in [1, 8].
        most_bytes: of the reference text that are read, in the order of the files; 20 bytes of memory each.
    """

    paths: list[str] = field(default_factory=list)
    order: int = 6
    most_bytes: int = 50_000_000

    def problems(self, config: PipelineConfig, world_size: int) -> list[Problem]:
        found = []
        if not self.paths:
            found.append(Problem("corpus.paths", "[]", "text files, or directories of them"))
        found += [
            Problem("corpus.paths", path, "a file or directory that exists")
            for path in self.paths
            if not Path(path).exists()
        ]
        if not 1 <= self.order <= HIGHEST_ORDER:
            found.append(Problem("corpus.order", self.order, f"1 to {HIGHEST_ORDER}"))
        if self.most_bytes < 1:
            found.append(Problem("corpus.most_bytes", self.most_bytes, "1 or more; some millions are enough"))
        return found

    def run(self, config: PipelineConfig, resolved: dict[str, Any]) -> int:
        """Read, count, write.

        Raises:
            ReferenceTextError: there is no file, no text, or a file that is not UTF-8.
            OccupiedError: the directory holds an artifact of another kind.
        """
        directory = Path(config.run_dir)
        files = sorted(file for path in self.paths for file in ([Path(path)] if Path(path).is_file() else below(path)))
        recipe = {
            "order": self.order,
            "most_bytes": self.most_bytes,
            "files": {os.path.relpath(file): sha256_of(file) for file in files},
        }
        with locked(directory):
            if finished(directory, KIND, recipe, {}):
                print(f"{directory} is finished: nothing to do", flush=True)
                return 0
            texts = list(self.texts(files))
            if not any(texts):
                raise ReferenceTextError(
                    f"{', '.join(self.paths)}: no text. Give files or directories with reference text."
                )
            withdraw(directory, KIND)
            draft = Draft(directory, KIND, recipe, {})
            train(texts, self.order).save(directory / FILE)
            draft.metrics = {"files": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
            draft.publish(FILE)
        print(f"{directory} is done: {draft.metrics['bytes']:,} bytes of {draft.metrics['files']:,} files", flush=True)
        return 0

    def texts(self, files: list[Path]) -> Iterator[str]:
        left = self.most_bytes
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ReferenceTextError(f"{file} is not UTF-8 ({error}); leave it out, or convert it.") from error
            if left <= 0:
                return
            yield text[:left]
            left -= len(text.encode())


def below(path: str) -> Iterator[Path]:
    return (file for file in Path(path).rglob("*") if file.is_file())
