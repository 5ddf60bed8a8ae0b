"""`python -m tools.tokenizer path=runs/demo/corpus tokenizer=DIR`: what any tokenizer would make of a corpus.

The documents come out of the corpus's own shards, decoded by its own tokenizer, so that the corpus's sources are not
needed. The report is that of the corpus's manifest (docs/tokenise.md), by source.
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from conf import entry
from conf.registry import register
from data_pipeline.encoding import Encoder
from data_pipeline.shards import open_shard
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_report import Sizes, report, table

BATCH = 500
"""Documents encoded together; bounds memory."""


@register("", "tokenizer_schema")
@dataclass(frozen=True)
class TokenizerConfig:
    """Show what a tokenizer makes of a corpus.

    Args:
        path: a corpus, whatever it was tokenised with.
        tokenizer: directory of the tokenizer: a corpus's `tokenizer/`, a model's, or any with a tokenizer.json.
        split: whose documents are encoded.
        documents: most documents that are encoded, from the first on; 0 for all.
        json: print the report as one JSON object instead of a table.
    """

    path: str = MISSING
    tokenizer: str = MISSING
    split: str = "validation"
    documents: int = 0
    json: bool = False


def measure(config: TokenizerConfig) -> dict[str, Any]:
    """The report; its `round_trip` also counts the documents that the tokenizer cannot express.

    Raises:
        TokenizerError: one of the two tokenizers cannot be read.
        ShardError: the corpus has no such split, or it is damaged.
    """
    from data_pipeline.engine import documents

    own = Tokenizer.load(Path(config.path) / "tokenizer")
    shard, _ = open_shard(config.path, config.split, own)
    listed = documents.all_rows(shard.stem.with_name(shard.stem.name + documents.ENDING))
    tokenizer = Tokenizer.load(config.tokenizer)
    encoder = Encoder(tokenizer)
    sizes: dict[tuple[str, ...], Sizes] = {}
    losses: Counter[str] = Counter()
    counts_V = np.zeros(tokenizer.vocabulary, np.int64)
    rows = itertools.islice(enumerate(listed), config.documents or None)
    while batch := list(itertools.islice(rows, BATCH)):
        texts = [own.decode(shard.document(number)[:-1].tolist(), skip_special=False) for number, _ in batch]
        for (_, (_, source, *_)), text, ids_T in zip(batch, texts, encoder.encode(texts), strict=True):
            if loss := None if tokenizer.lossless else tokenizer.loss(text, ids_T.tolist()):
                losses[loss] += 1
            sizes.setdefault((config.split, "", "", source), Sizes()).add(text, len(ids_T))
            counts_V += np.bincount(ids_T, minlength=tokenizer.vocabulary)
    return {**report(tokenizer, sizes, counts_V), "round_trip": dict(losses)}


def main(config: TokenizerConfig, resolved: dict[str, Any]) -> int:
    found = measure(config)
    if config.json:
        print(json.dumps(found))
        return 0
    print(table(found))
    kept = found["all"]["documents"] - sum(found["round_trip"].values())
    print("; ".join([f"came back exactly {kept:,}", *(f"{loss} {n:,}" for loss, n in found["round_trip"].items())]))
    return 0


if __name__ == "__main__":
    entry.run("tokenizer", TokenizerConfig, main)
