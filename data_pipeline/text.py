"""Text for pre-training: windows of a corpus, which lose nothing that is not left out on purpose.

By default window i predicts tokens i*L + 1 ... (i + 1)*L of the split from those before them, so every token of the
split but the very first stands exactly once where it could be predicted. A window that is not full is filled up with
padding (documents -1, no labels), so the perplexity of a split is exact. A document that crosses windows counts as a
new document in each; the first token of a document is predicted from nothing and has no label.

Shape suffixes: B windows, L tokens, S spans, N tokens of all windows without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import fingerprint
from data_pipeline.batch import IGNORED, MicroBatch, Span
from data_pipeline.shards import Shard, ShardError, open_shard
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.windows import BLOCK, LONG_DOCUMENTS, BestFit, Stream, Trimmed, Windows, remembered

PADDING = -1
PACKING = ("stream", "best_fit")


@register("data", "text")
@dataclass(frozen=True)
class TextData:
    """Windows of running text out of a corpus.

    Args:
        path: corpus artifact, as `python -m data_pipeline` writes it.
        sequence_length: tokens per window.
        packing: "stream" cuts the documents, one after the other, every `sequence_length` tokens; "best_fit" cuts none
            that fits into a window, and leaves some padding.
        long_documents: what happens to a document longer than a window: "split" goes on in other windows, "cut" keeps
            its beginning, "drop" leaves it out. Held-out documents are read whole.
    """

    path: str = "runs/corpus"
    sequence_length: int = 512
    packing: str = "stream"
    long_documents: str = "split"

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        found = []
        if self.sequence_length < 1:
            found.append(Problem("data.sequence_length", self.sequence_length, "at least 1 token"))
        if not self.path:
            found.append(Problem("data.path", "", "the directory of a corpus, for instance runs/demo/corpus"))
        return found + window_problems("data", self.packing, self.long_documents)

    def open(self, split: str, tokenizer: Tokenizer, seed: int) -> "TextWindows":
        """The windows of one split; the seed plays no part, as nothing is sampled.

        Raises:
            ArtifactError: `path` is no finished corpus.
            ShardError: the split is missing, damaged, empty, or of another tokenizer.
        """
        shard, artifact = open_shard(self.path, split, tokenizer)
        windows, name = self.windows(shard, artifact.id)
        return TextWindows(windows, tokenizer.vocabulary, tokenizer.pad, name)

    def windows(self, shard: Shard, corpus: str) -> tuple[Windows, str]:
        """How the documents of a shard are laid out, and the fingerprint of that.

        Args:
            shard: a split of the corpus in `path`.
            corpus: the id of that artifact.
        """
        split = shard.stem.name
        parts = ["text", corpus, split, self.sequence_length]
        long_documents = self.long_documents if split == "train" else "split"
        if self.packing == "stream" and long_documents == "split":
            return Stream(shard, self.sequence_length), fingerprint(parts)
        name = fingerprint([*parts, self.packing, long_documents, BLOCK])
        kind = BestFit if self.packing == "best_fit" else Trimmed
        counted = remembered(Path(self.path) / "windows" / f"{name}.npy")
        return kind(shard, self.sequence_length, long_documents, counted), name


def window_problems(key: str, packing: str, long_documents: str) -> list[Problem]:
    """What is wrong with the settings of windows, which stand under `key`."""
    found = []
    if packing not in PACKING:
        found.append(Problem(f"{key}.packing", packing, f"one of {', '.join(PACKING)}"))
    if long_documents not in LONG_DOCUMENTS:
        found.append(Problem(f"{key}.long_documents", long_documents, f"one of {', '.join(LONG_DOCUMENTS)}"))
    return found


class TextWindows:
    """The windows of a shard as micro-batches.

    Args:
        windows: what each holds.
        vocabulary: ids are below this.
        pad: id that fills a window up.
        fingerprint: names this set of samples.

    Raises:
        ShardError: there is nothing to predict.
    """

    def __init__(self, windows: Windows, vocabulary: int, pad: int, fingerprint: str):
        self.windows = windows
        self.shard = windows.shard
        self.vocabulary = vocabulary
        self.pad = pad
        self.fingerprint = fingerprint
        if not len(windows):
            raise ShardError(
                f"{self.shard.stem} holds {self.shard.documents} documents with {len(self.shard.tokens_T)} tokens, of "
                f"which windows of {windows.sequence_length} leave nothing to train on or to measure. Give more text, "
                "this split a larger share (corpus.validation, corpus.test), or long_documents=split."
            )

        self.shard.scattered()

    def __len__(self) -> int:
        return len(self.windows)

    def spans(self, index: int) -> list[Span]:
        """What a window holds, in order."""
        spans = self.windows.spans(index)
        starts_S = [int(self.shard.starts(number, number + 1)[0]) for number in spans.documents_S.tolist()]
        begins_S = spans.sources_S - starts_S
        parts = zip(spans.documents_S, begins_S, begins_S + spans.inputs_S, strict=True)
        return [Span(str(self.shard.stem), *map(int, part)) for part in parts]

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Windows by number.

        Raises:
            ShardError: an id is outside the vocabulary: the file was damaged after it was opened.
        """
        length, tokens_T = self.windows.sequence_length, self.shard.tokens_T
        spans = [self.windows.spans(index) for index in indices]
        every = type(spans[0]).joined(spans)
        for source, count in zip(every.sources_S.tolist(), every.inputs_S.tolist(), strict=True):
            self.shard.announce(source, count)  # all of them, before the first is waited for
        counts_B = np.array([len(s.inputs_S) for s in spans])
        first_S = np.repeat(np.cumsum(counts_B) - counts_B, counts_B)  # of the spans of the same window
        before_S = np.cumsum(every.inputs_S) - every.inputs_S
        places_S = np.repeat(np.arange(len(spans)) * length, counts_B) + before_S - before_S[first_S]
        numbers_N = np.arange(every.inputs_S.sum())
        # Of every token: where it goes, where it comes from, how far it is in its document.
        places_N = numbers_N + np.repeat(places_S - before_S, every.inputs_S)
        sources_N = numbers_N + np.repeat(every.sources_S - before_S, every.inputs_S)
        read_N = tokens_T[sources_N].astype(np.int64)
        predicted_N = tokens_T[np.minimum(sources_N + 1, len(tokens_T) - 1)].astype(np.int64)
        predicted_N[(before_S + every.inputs_S - 1)[every.ending_S]] = IGNORED
        if max(read_N.max(), predicted_N.max()) >= self.vocabulary or read_N.min() < 0:
            raise ShardError(
                f"{self.shard.stem}.bin has ids {read_N.min()} to {max(read_N.max(), predicted_N.max())} in windows "
                f"{list(indices)}, the vocabulary ends at {self.vocabulary - 1}: the file was damaged. Build the "
                "corpus again."
            )

        def laid_out(values_N: np.ndarray, elsewhere: int) -> torch.Tensor:
            laid = np.full(len(spans) * length, elsewhere, dtype=np.int64)
            laid[places_N] = values_N
            return torch.from_numpy(laid.reshape(len(spans), length))

        return MicroBatch(
            tokens_BL=laid_out(read_N, self.pad),
            labels_BL=laid_out(predicted_N, IGNORED),
            positions_BL=laid_out(numbers_N - np.repeat(before_S, every.inputs_S), 0),
            documents_BL=laid_out(np.repeat(np.arange(len(first_S)) - first_S, every.inputs_S), PADDING),
            samples_B=torch.tensor(indices, dtype=torch.int64),
        )
