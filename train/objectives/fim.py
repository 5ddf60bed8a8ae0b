"""Fill-in-the-middle: move a document's middle to its end and learn it from left to right (Bavarian et al. 2022,
arXiv:2207.14255).

Documents are rearranged within their window, after tokenisation, so lengths and positions stay as they were: the three
sentinels take the place of the last three tokens before the end of the document.

Shape suffixes: B sequences, L tokens.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from conf.errors import Problem
from conf.registry import register
from train.objectives.base import IGNORED, CrossEntropy, MicroBatch, keyed

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer

SENTINELS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@register("objective", "fim")
@dataclass(frozen=True)
class FillInTheMiddle(CrossEntropy):
    """Cross-entropy over every token, sentinels included, in nats per token; documents left alone are plain causal
    language modelling, so ability from left to right is kept ("FIM for free", section 3).

    Args:
        rate: share of documents that are rearranged; in [0, 1].
        spm_rate: of these, the share written suffix first (SPM, with the sentinels of appendix D); in [0, 1]. The
            others are written prefix first (PSM).
    """

    rate: float = 0.5
    spm_rate: float = 0.5

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        return [
            Problem(f"objective.{name}", value, "from 0 to 1, for instance 0.5")
            for name, value in (("rate", self.rate), ("spm_rate", self.spm_rate))
            if not 0 <= value <= 1
        ]

    def prepare(self, micro_batch: MicroBatch, seed: int, tokenizer: "Tokenizer") -> MicroBatch:
        """Rearrange documents and label them anew. Where the window cuts a rearranged document, the token after its
        last one is not known, and that position predicts nothing; unless it is the end of the document, which stays
        where it was."""
        sentinels = [tokenizer.special(name) for name in SENTINELS]
        tokens_BL, labels_BL = micro_batch.tokens_BL.numpy().copy(), micro_batch.labels_BL.numpy().copy()
        for tokens_L, labels_L, documents_L, sample in zip(
            tokens_BL, labels_BL, micro_batch.documents_BL.numpy(), micro_batch.samples_B.tolist(), strict=True
        ):
            random = keyed(seed, sample)
            bounds = [0, *(np.flatnonzero(np.diff(documents_L)) + 1).tolist(), len(documents_L)]
            for begin, end in pairwise(bounds):
                fate, order, cuts = random.random(), random.random(), random.random(2)  # drawn whether used or not
                if documents_L[begin] < 0 or fate >= self.rate:
                    continue
                span = slice(begin, end)
                moved = self._rearranged(tokens_L[span], tokenizer.eos, sentinels, order < self.spm_rate, cuts)
                if moved is not None:
                    tokens_L[span] = moved
                    ends = labels_L[end - 1] == tokenizer.eos  # best fit: the end of the document is only a label
                    labels_L[span] = [*moved[1:], tokenizer.eos if ends else IGNORED]
        return replace(micro_batch, tokens_BL=torch.from_numpy(tokens_BL), labels_BL=torch.from_numpy(labels_BL))

    @staticmethod
    def _rearranged(
        tokens_L: np.ndarray, eos: int, sentinels: list[int], suffix_first: bool, cuts: np.ndarray
    ) -> np.ndarray | None:
        """One document with its middle last, in as many tokens; None where it is too short to have three parts."""
        tail_L = tokens_L[-1:] if tokens_L[-1] == eos else tokens_L[:0]
        text_L = tokens_L[: len(tokens_L) - len(tail_L) - len(sentinels)]
        if len(text_L) < len(sentinels):
            return None
        first, second = np.sort((cuts * (len(text_L) + 1)).astype(np.int64))
        prefix_L, middle_L, suffix_L = text_L[:first], text_L[first:second], text_L[second:]
        pre, suf, mid = (np.array([sentinel]) for sentinel in sentinels)
        if suffix_first:
            parts = [pre, suf, suffix_L, mid, prefix_L, middle_L, tail_L]
        else:
            parts = [pre, prefix_L, suf, suffix_L, mid, middle_L, tail_L]
        return np.concatenate(parts)
