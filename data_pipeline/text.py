"""Text for pre-training: windows of the concatenated token stream.

Window i predicts tokens i*L + 1 ... (i + 1)*L of the split from those before them, so every token of the split but the
very first stands exactly once where it could be predicted. The last window is filled up with padding (documents -1, no
labels): a split loses nothing, and its perplexity is exact. A document that crosses windows counts as a new document in
each; the first token of a document is predicted from nothing and has no label.

Shape suffixes: B windows, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import fingerprint
from data_pipeline.batch import IGNORED, MicroBatch
from data_pipeline.shards import Shard, ShardError, open_shard
from data_pipeline.tokenizer import Tokenizer

PADDING = -1


@register("data", "text")
@dataclass(frozen=True)
class TextData:
    """Windows of running text out of a corpus.

    Args:
        path: corpus artifact, as `python -m data_pipeline` writes it.
        sequence_length: tokens per window.
    """

    path: str = "runs/corpus"
    sequence_length: int = 512

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        found = []
        if self.sequence_length < 1:
            found.append(Problem("data.sequence_length", self.sequence_length, "at least 1 token"))
        if not self.path:
            found.append(Problem("data.path", "", "the directory of a corpus, for instance runs/demo/corpus"))
        return found

    def open(self, split: str, tokenizer: Tokenizer, seed: int) -> "TextWindows":
        """The windows of one split; the seed plays no part, as nothing is sampled.

        Raises:
            ArtifactError: `path` is no finished corpus.
            ShardError: the split is missing, damaged, empty, or of another tokenizer.
        """
        shard, artifact = open_shard(self.path, split, tokenizer)
        name = fingerprint(["text", artifact.id, split, self.sequence_length])
        return TextWindows(shard, self.sequence_length, tokenizer.vocabulary, tokenizer.pad, name)


class TextWindows:
    """The windows of a shard.

    Args:
        shard: where the tokens are.
        sequence_length: tokens per window.
        vocabulary: ids are below this.
        pad: id that fills the last window up.
        fingerprint: names this set of samples.

    Raises:
        ShardError: there is nothing to predict: fewer than two tokens.
    """

    def __init__(self, shard: Shard, sequence_length: int, vocabulary: int, pad: int, fingerprint: str):
        self.shard = shard
        self.sequence_length = sequence_length
        self.vocabulary = vocabulary
        self.pad = pad
        self.fingerprint = fingerprint
        if len(shard.tokens_T) < 2:
            raise ShardError(
                f"{shard.stem} holds {shard.documents} documents with {len(shard.tokens_T)} tokens: nothing to train "
                "on or to measure. Give more text, or this split a larger share (corpus.validation, corpus.test)."
            )

    def __len__(self) -> int:
        return -(-(len(self.shard.tokens_T) - 1) // self.sequence_length)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Windows by number.

        Raises:
            ShardError: an id is outside the vocabulary: the file was damaged after it was opened.
        """
        length = self.sequence_length
        tokens_BL = np.full((len(indices), length), self.pad, dtype=np.int64)
        labels_BL = np.full((len(indices), length), IGNORED, dtype=np.int64)
        positions_BL = np.zeros((len(indices), length), dtype=np.int64)
        documents_BL = np.full((len(indices), length), PADDING, dtype=np.int64)
        for row, index in enumerate(indices):
            begin = index * length
            stream = np.asarray(self.shard.tokens_T[begin : begin + length + 1], dtype=np.int64)
            count = len(stream) - 1
            places = np.arange(begin, begin + count + 1)
            first = np.searchsorted(self.shard.ends_D, begin, side="right")
            last = np.searchsorted(self.shard.ends_D, places[-1], side="right")
            ends = self.shard.ends_D[first:last]
            documents = np.searchsorted(ends, places, side="right")
            starts = np.concatenate([[begin], ends])[documents]
            tokens_BL[row, :count] = stream[:-1]
            labels_BL[row, :count] = np.where(documents[1:] == documents[:-1], stream[1:], IGNORED)
            positions_BL[row, :count] = (places - starts)[:-1]
            documents_BL[row, :count] = documents[:-1]
        if max(tokens_BL.max(), labels_BL.max()) >= self.vocabulary or tokens_BL.min() < 0:
            raise ShardError(
                f"{self.shard.stem}.bin has ids {tokens_BL.min()} to {tokens_BL.max()} in windows {list(indices)}, "
                f"the vocabulary ends at {self.vocabulary - 1}: the file was damaged. Build the corpus again."
            )
        return MicroBatch(
            tokens_BL=torch.from_numpy(tokens_BL),
            labels_BL=torch.from_numpy(labels_BL),
            positions_BL=torch.from_numpy(positions_BL),
            documents_BL=torch.from_numpy(documents_BL),
            samples_B=torch.tensor(indices, dtype=torch.int64),
        )
