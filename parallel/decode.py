"""A placed model that says, token by token, what comes next: it stands where text generation wants a model.

All ranks are given the same prompts and call together. Every stage keeps the keys and values of its layers and heads.

Shape suffixes: B sequences, L tokens, N features, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.pipeline import Part, Pipeline


class Caches:
    """Each stage's keys and values.

    Args:
        make: makes that of a stage.
    """

    def __init__(self, pipeline: Pipeline, make: Callable[[Part], Any]):
        self.of_stage = {stage: make(part) for stage, part in pipeline.parts.items()}

    def keep(self, rows_B: Tensor) -> None:
        """Go on with some of the sequences only."""
        for cache in self.of_stage.values():
            cache.keep(rows_B)


class Decoding:
    """What a generator needs of a decoder.

    Args:
        model: has `config`, `vocabulary` and `width`.
        pipeline: its stages.
        compute: dtype of the hidden states between them.
    """

    def __init__(self, model: Any, pipeline: Pipeline, compute: torch.dtype):
        self.config, self.vocabulary, self.width = model.config, model.vocabulary, model.width
        self.pipeline, self.compute, self.device = pipeline, compute, pipeline.device

    def new_cache(self, batch: int, capacity: int) -> Caches:
        """Room for so many sequences of so many tokens."""
        return Caches(self.pipeline, lambda part: part.model.new_cache(batch, capacity))  # type: ignore[operator]

    @torch.no_grad()
    def next_logits(self, tokens_BL: Tensor, positions_BL: Tensor, documents_BL: Tensor, cache: Any) -> Tensor:
        """logits_BV of the token after the last; the tokens are added to `cache`, which `new_cache` made."""
        logits_BV = torch.zeros(tokens_BL.shape[0], self.vocabulary, dtype=self.compute, device=self.device)

        def forward(part: Part, number: int, hidden_BLN: Tensor | None) -> Tensor:
            inputs = tokens_BL if hidden_BLN is None else hidden_BLN
            answer = part.model(inputs, positions_BL, documents_BL, next_only=True, cache=cache.of_stage[part.stage])
            if part.stage == self.pipeline.stages - 1:
                logits_BV.copy_(answer[:, -1])
            return answer

        self.pipeline.infer(1, forward, lambda _: (*tokens_BL.shape, self.width), self.compute)
        return self.pipeline.from_last(logits_BV)
