"""Export as a Hugging Face directory, which transformers, vLLM and most other engines load."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conf.errors import Problem
from conf.registry import register
from data_pipeline.tokenizer import Tokenizer
from train.export.base import Exporter
from train.export.card import model_card
from train.export.gate import Verdict
from train.export.source import Source, end_ids
from train.models import hf, hf_weights
from train.models.hf_weights import Stored
from train.models.transformer import DecoderConfig

if TYPE_CHECKING:
    from train.config import RunConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample")
"""What a model brought as advice for sampling is passed on."""


class OverflowInExportError(hf.HuggingFaceError):
    """A weight is too large for the dtype it shall be written in."""


@register("export", "huggingface")
@dataclass(frozen=True)
class HuggingFaceExporter(Exporter):
    """Sharded safetensors, config, tokenizer, chat template, generation config and model card.

    Args:
        dtype: of the weights: float32, bfloat16 or float16. A verification compares with the weights rounded to it.
        max_shard_bytes: largest weight file, in bytes.
    """

    dtype: str = "float32"
    max_shard_bytes: int = 5_000_000_000

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        found = []
        if self.dtype not in DTYPES:
            found.append(Problem("export.dtype", self.dtype, f"one of {', '.join(DTYPES)}"))
        if self.max_shard_bytes < 1:
            found.append(Problem("export.max_shard_bytes", self.max_shard_bytes, "must be at least 1"))
        return found

    def write(self, directory: Path, source: Source, verdict: Verdict) -> None:
        """Raises OverflowInExportError, or HuggingFaceError where the model cannot be read or written."""
        tokenizer = source.tokenizer
        if tokenizer.chat_template is not None:  # readers older than chat_template.jinja look in tokenizer_config.json
            config = {**tokenizer.config, "chat_template": tokenizer.chat_template}
            tokenizer = Tokenizer(tokenizer.backend, config, tokenizer.chat_template, tokenizer.source)
        architecture = source.config
        if hf.architecture(architecture) == "qwen2" and not keeps_tokenizer(source):
            architecture = as_llama(architecture)
        weights = Rounded(source.weights(), architecture, DTYPES[self.dtype])
        hf_weights.write_from(directory, architecture, weights, tokenizer, self.max_shard_bytes)
        generation = generation_config(source)
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        parameters = sum(tensor.numel() for tensor in weights.meta.values())
        (directory / "README.md").write_text(model_card(source, verdict, self.dtype, parameters))


class Rounded:
    """Stored weights in another dtype, one at a time as they are written.

    Args:
        stored: the weights.
        architecture: what they are written as; parameters that only this one has are 0.
        dtype: of the files.

    Attributes:
        meta: as that of `hf_weights.Weights`.
    """

    def __init__(self, stored: Stored, architecture: DecoderConfig, dtype: torch.dtype):
        self._stored = stored
        rows = stored.meta[hf.EMBEDDING].shape[0]
        self.meta = {name: meta.to(dtype) for name, meta in hf_weights.parameters(architecture, rows).items()}

    def rows(self, name: str, first: int, last: int, to: int = 0) -> Tensor:
        """Rows [first, last) of a parameter.

        Raises:
            OverflowInExportError: they have values that are not finite in this dtype.
        """
        meta = self.meta[name]
        if name not in self._stored.meta:
            return torch.zeros(last - first, *meta.shape[1:], dtype=meta.dtype)
        rows = self._stored.rows(name, first, last).to(meta.dtype)
        if not rows.isfinite().all():
            raise OverflowInExportError(
                f"{name} has values that are not finite in {meta.dtype}: export.dtype=bfloat16 has the range of "
                "float32; where that fails too, the model itself is broken."
            )
        return rows


def keeps_tokenizer(source: Source) -> bool:
    """Whether transformers uses the tokenizer as it is stored: beside a Qwen2 model it puts Qwen's own normaliser and
    pre-tokeniser in the place of any other, and texts get other ids without a word."""
    from transformers import AutoTokenizer

    theirs = json.loads(
        AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False).backend_tokenizer.to_str()
    )
    ours = json.loads(source.tokenizer.backend.to_str())
    return all(theirs[part] == ours[part] for part in ("normalizer", "pre_tokenizer"))


def as_llama(config: DecoderConfig) -> DecoderConfig:
    """The same function as a Llama: what Qwen2 has no bias for gets one of zeros."""
    return replace(config, output_bias=True)


def generation_config(source: Source) -> dict[str, Any]:
    """When to stop, and the sampling advice that came with the model."""
    stored = source.directory / "generation_config.json"
    advice = json.loads(stored.read_text()) if stored.exists() else {}
    return {
        "eos_token_id": end_ids(source.directory, source.tokenizer),
        "pad_token_id": source.tokenizer.pad,
        **{key: advice[key] for key in SAMPLING if advice.get(key) is not None},
    }
