"""A model on disk becomes something that can be asked.

Shape suffixes: B sequences, L tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.batch import MicroBatch
from data_pipeline.tokenizer import Tokenizer
from train.export.source import Source
from train.models import hf_weights
from train.models.transformer import Decoder


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Args:
        name: what it is called in results: the name of its directory.
        source: where it comes from.
        model: on the device, in the dtype of the evaluation.
    """

    name: str
    source: Source
    model: Decoder

    @classmethod
    def load(cls, path: str, device: torch.device, dtype: torch.dtype) -> "Subject":
        """Read a training run, an export, or a Hugging Face directory.

        Raises:
            LongrunError: see `Source.read`, and `hf_weights.Stored`.
        """
        source = Source.read(path)
        model = hf_weights.decoder(source.directory, source.config, device, dtype)
        return cls(name_of(path), source, model)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer

    @torch.inference_mode()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """logprobs_BL of the labels, on the CPU."""
        there = batch.to(self.model.head.device)
        return self.model(there.tokens_BL, there.positions_BL, there.documents_BL, there.labels_BL).cpu()


def name_of(path: str) -> str:
    return Path(path).resolve().name
