"""Bands of perplexity under a model of text that is wanted (Wenzek et al. 2020, arXiv:1911.00359, section 3.4).

Perplexity is given per byte and as its logarithm, in bits per byte, so that bands are comparable between tokenizers: by
a model of good prose, clean prose is near its validation loss, gibberish far above, and boilerplate far below.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.ngram import FILE, NGram
from data_pipeline.page import Page
from data_pipeline.steps.base import PROSE, DocumentStep

SCORE = "bits_per_byte"
HUGGING_FACE = ("config.json", "tokenizer*", "*.safetensors")
"""Files of a model that is not ours; weights in other formats are not loaded."""
"""Metadata key."""


@register("corpus/step", "perplexity")
@dataclass(frozen=True)
class Perplexity(DocumentStep):
    """Keep documents that are neither too unlikely nor too likely; `bits_per_byte` goes to the metadata.

    Args:
        model: directory of a model: what `python -m data_pipeline corpus=ngram` made, or a causal language model with
            its tokenizer as Hugging Face saves them, our own exports included.
        least: bits per byte below which documents are dropped.
        most: bits per byte above which documents are dropped; 0 for no bound.
        most_tokens: of a document that a language model reads, from its beginning; an n-gram model reads all.
        device: where a language model runs: cpu, cuda, cuda:1; every worker process loads its own.
    """

    kinds: list[str] = field(default_factory=lambda: list(PROSE))
    model: str = ""
    least: float = 0.0
    most: float = 0.0
    most_tokens: int = 1024
    device: str = "cpu"

    def problems(self, key: str) -> list[Problem]:
        found = super().problems(key)
        if not self.is_ngram and not all(any(Path(self.model).glob(pattern)) for pattern in HUGGING_FACE):
            fix = f"a directory that holds {FILE}, made by corpus=ngram, or {', '.join(HUGGING_FACE)}"
            found.append(Problem(f"{key}.model", self.model, fix))
        if self.least < 0:
            found.append(Problem(f"{key}.least", self.least, "0 or more bits per byte"))
        if self.most < 0 or 0 < self.most <= self.least:
            found.append(Problem(f"{key}.most", self.most, f"0 for no bound, or more than least={self.least}"))
        if self.most_tokens < 1:
            found.append(Problem(f"{key}.most_tokens", self.most_tokens, "1 or more"))
        return found

    def state(self) -> Any:
        files = sorted(file for file in Path(self.model).iterdir() if file.is_file() and file.name != "manifest.json")
        return {file.name: digest(file) for file in files}

    def judge(self, page: Page) -> str | None:
        bits = self.bits_per_byte(page.text)
        page.metadata[SCORE] = round(bits, 4)
        page.counts[f"{math.floor(bits * 4) / 4:.2f} bits per byte"] += 1  # a histogram for choosing the band
        if bits < self.least:
            return "too_likely"
        return "too_unlikely" if 0 < self.most < bits else None

    @property
    def is_ngram(self) -> bool:
        return (Path(self.model) / FILE).is_file()

    @cached_property
    def bits_per_byte(self) -> Callable[[str], float]:
        if self.is_ngram:
            return NGram.load(Path(self.model) / FILE).bits_per_byte
        return language_model(self.model, self.most_tokens, self.device)


def language_model(directory: str, most_tokens: int, device: str) -> Callable[[str], float]:
    """What a causal language model says of a text: information of its first tokens, per byte that they stand for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, use_safetensors=True)
    model.to(device).eval()
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    context = getattr(model.config, "max_position_embeddings", None) or most_tokens + 1
    longest = min(most_tokens, context - 1)

    @torch.inference_mode()
    def bits_per_byte(text: str) -> float:
        encoded = tokenizer(
            text, add_special_tokens=False, truncation=True, max_length=longest, return_offsets_mapping=True
        )
        ids = encoded["input_ids"]
        if not ids:
            return 0.0
        given = torch.tensor([[begin, *ids]], device=device)
        logits = model(given[:, :-1]).logits.float()
        nats = torch.nn.functional.cross_entropy(logits[0], given[0, 1:], reduction="sum").item()
        return nats / math.log(2) / max(len(text[: encoded["offset_mapping"][-1][1]].encode()), 1)

    return bits_per_byte


def digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
